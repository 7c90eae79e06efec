"""Prompts: the streams attend to their prompts, `encode_prompt`, guidance, and prompts of any text."""

from __future__ import annotations

import json
import logging
from copy import deepcopy

import pytest
import torch
from tiny_text import tiny_text_encoder

from autoencoder.attention import attention
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.embeddings import CaptionEmbedding
from pipelines.rollout import rollout
from pipelines.text import encode_captions, tokenize_captions

CHANNELS = 16


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder()


@pytest.fixture(scope="module", params=[False, True], ids=["attention", "pooling"])
def transformer(make_transformer, request) -> VidTwinTransformer3DModel:
    return make_transformer(caption_channels=CHANNELS, caption_pooling=request.param, image_conditioning=True)


@pytest.fixture
def pipe(vae, transformer, encoder) -> VidTwinPipeline:
    names = {0: "Biking", 1: "Diving", 2: "Yo Yo"}
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler(), id2label=names, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipe: VidTwinPipeline, *args, seeds=(0,), **options) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": 2, "output_type": "latent", "generator": generator}
    return pipe(*args, **settings, **options).frames


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# --- the transformer -------------------------------------------------------------------------------------------------


def predict(model, tokens=None, mask=None, batch=2):
    noise = torch.randn(batch, model.latent_size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * batch)
    with torch.no_grad():
        return model(
            noise, torch.tensor([500] * batch), labels, encoder_hidden_states=tokens, encoder_attention_mask=mask
        ).sample


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 5, CHANNELS, generator=torch.Generator().manual_seed(1))


def test_a_model_without_captions_has_no_further_weights(make_transformer, tokens):
    model = make_transformer()
    assert not [name for name in model.state_dict() if "caption" in name or "attn3" in name]
    with pytest.raises(ValueError, match="takes no captions: leave encoder_hidden_states out"):
        predict(model, tokens)


def test_each_stream_attends_to_its_tokens_only(transformer, tokens):
    """Without self-attention no stream depends on the tokens of the other, nor on padding."""
    model = VidTwinTransformer3DModel.from_config(transformer.config).eval()
    model.load_state_dict(transformer.state_dict())
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_out.weight)
        torch.nn.init.zeros_(block.attn1.to_out.bias)
    size = torch.tensor(model.structure_shape).prod().item()
    mask = torch.zeros(2, 2, 5, dtype=torch.bool)
    mask[:, 0, :2] = mask[:, 1, 2:4] = True  # structure: two tokens, dynamics: two, the last is padding
    base = predict(model, tokens, mask)
    for token, changes in ((1, (True, False)), (3, (False, True)), (4, (False, False))):
        other = tokens.clone()
        other[:, token] += 1
        parts = zip(
            predict(model, other, mask).split([size, base.shape[1] - size], 1), base.split(size, 1)[:1], strict=False
        )
        structure = next(parts)
        assert torch.equal(*structure) != changes[0]
        assert torch.equal(predict(model, other, mask)[:, size:], base[:, size:]) != changes[1]


def test_one_prompt_serves_both_streams_and_none_is_the_null_token(transformer, tokens):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    both = predict(transformer, tokens, mask)
    assert torch.equal(both, predict(transformer, tokens, mask[:, None].expand(-1, 2, -1)))
    assert close(both[:1], predict(transformer, tokens[:, :3], mask[:, :3])[:1]), "padding has no effect"
    assert torch.equal(predict(transformer, tokens), predict(transformer, tokens, torch.ones(2, 5)))
    without = predict(transformer)
    assert close(without, predict(transformer, tokens, torch.zeros(2, 5)))
    assert close(without, predict(transformer, tokens[:, :0]))
    assert not close(without, both)


def test_added_captions_leave_the_output_unchanged(make_transformer, tokens):
    model = make_transformer()
    added = make_transformer(caption_channels=CHANNELS, caption_pooling=True)
    added.reset_parameters()
    added.load_state_dict({**added.state_dict(), **model.state_dict()})
    assert torch.equal(predict(added, tokens), predict(model))
    predict_with_gradients = added(torch.randn(2, added.latent_size), torch.tensor([5, 5]), torch.tensor([0, 0]),
                                   encoder_hidden_states=tokens).sample  # fmt: skip
    predict_with_gradients.square().mean().backward()
    assert added.transformer_blocks[0].attn3.to_out.weight.grad.abs().sum() > 0
    assert added.caption_pool.proj[-1].weight.grad.abs().sum() > 0


def test_pooling_sees_the_mean_of_the_streams_tokens(make_transformer, tokens):
    """Without attention to captions, each stream depends on its tokens, in any order."""
    model = make_transformer(caption_channels=CHANNELS, caption_pooling=True)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn3.to_out.weight)
        torch.nn.init.zeros_(block.attn3.to_out.bias)
    base, without = predict(model, tokens), predict(model)
    assert not close(base, without)
    assert close(base, predict(model, tokens.flip(1)))
    pooled = model.caption_pool(tokens, torch.tensor([[[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]] * 2))
    assert torch.equal(pooled[:, 1], torch.zeros_like(pooled[:, 1]))
    torch.testing.assert_close(pooled[:, 0], model.caption_pool(tokens[:, :2])[:, 0])


def test_rows_of_frames_share_the_pooled_caption_of_dynamics(make_transformer, tokens):
    model = make_transformer(caption_channels=CHANNELS, caption_pooling=True)
    rows = 1 + model.num_frame_rows
    latents, labels = torch.randn(2, model.latent_size), torch.tensor([0, 1])
    with torch.no_grad():
        few, many = (
            model(latents, torch.full((2, n), 500.0), labels, encoder_hidden_states=tokens).sample for n in (2, rows)
        )
    torch.testing.assert_close(few, many)


def test_pooling_without_captions_and_precomputed_modulations_are_refused(make_transformer):
    with pytest.raises(ValueError, match="caption_pooling requires caption_channels"):
        make_transformer(caption_pooling=True)
    model = make_transformer(caption_channels=CHANNELS, caption_pooling=True)
    with pytest.raises(ValueError, match="with caption_pooling depend on captions"):
        model.modulations(torch.tensor([5, 5]), torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.zeros(2, 5, 3), None, r"encoder_hidden_states must be \(2, N, 16\), not \(2, 5, 3\)"),
        (torch.zeros(1, 5, 16), None, r"must be \(2, N, 16\), not \(1, 5, 16\)"),
        (torch.zeros(2, 5, 16), torch.ones(2, 4), r"encoder_attention_mask must be \(2, 5\) or \(2, 2, 5\)"),
    ],
)
def test_embeddings_of_another_shape_are_refused(transformer, tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        predict(transformer, tokens, mask)


@pytest.mark.parametrize("faster", [True, False])
def test_masks_are_applied_in_half_precision(monkeypatch, faster):
    monkeypatch.setattr("autoencoder.attention.is_clearly_faster", lambda dtype: faster)
    query, key, value = (torch.randn(2, length, 2, 8) for length in (3, 4, 4))
    mask = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]]).bool().expand(2, 1, 3, 4)
    expected = attention(query, key, value, mask=mask)
    half = attention(*(x.bfloat16() for x in (query, key, value)), mask=mask)
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
    assert not torch.allclose(expected, attention(query, key, value))


def test_a_row_without_tokens_attends_to_the_null_token_alone():
    embed = CaptionEmbedding(3, 4)
    tokens, mask = embed(1, (2, 1), torch.randn(1, 2, 3), torch.tensor([[[1, 1], [0, 0]]]))
    assert tokens.shape == (1, 3, 4) and torch.equal(tokens[0, 0], embed.null_token[0, 0])
    assert mask.int().tolist() == [[[[0, 1, 1], [0, 1, 1], [1, 0, 0]]]]


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_and_their_embeddings_give_the_same_videos(pipe):
    texts = {"prompt": "a red disc", "dynamics_prompt": "spins", "negative_prompt": "two dogs"}
    video = sample(pipe, guidance_scale=3.0, **texts)
    embeds = dict(
        zip(
            ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
            pipe.encode_prompt(**texts),
            strict=True,
        )
    )
    assert embeds["prompt_attention_mask"].shape[1] == 2
    assert torch.equal(sample(pipe, guidance_scale=3.0, **embeds), video)
    pipe.register_modules(text_encoder=None, tokenizer=None)
    assert torch.equal(sample(pipe, guidance_scale=3.0, **embeds), video), "the encoder is optional"
    with pytest.raises(
        ValueError, match="prompt: this pipeline has no text_encoder and tokenizer; pass prompt_embeds"
    ):
        sample(pipe, prompt="a disc")


def test_every_prompt_of_a_list_has_its_videos(pipe):
    prompts, scale = ["a red disc orbits", "two dogs", ""], (2.0, 4.0)
    videos = sample(pipe, prompt=prompts, num_videos_per_prompt=2, guidance_scale=scale, seeds=range(6))
    for row, prompt in enumerate(prompts):
        for copy in range(2):
            single = sample(pipe, prompt=prompt, guidance_scale=scale, seeds=[2 * row + copy])
            assert close(videos[2 * row + copy : 2 * row + copy + 1], single)
    assert close(videos[5:], sample(pipe, seeds=[5])), "an empty prompt is none"


def test_one_prompt_for_each_stream(pipe):
    both = sample(pipe, prompt="a red disc")
    assert torch.equal(sample(pipe, structure_prompt="a red disc", dynamics_prompt="a red disc"), both)
    mixed = sample(pipe, prompt="a red disc", dynamics_prompt="spins")
    assert torch.equal(sample(pipe, structure_prompt="a red disc", dynamics_prompt="spins"), mixed)
    embeds, mask, *_ = pipe.encode_prompt("a red disc", dynamics_prompt="spins")
    own = [pipe.encode_prompt(text)[0][0] for text in ("a red disc", "spins")]
    for stream in range(2):
        assert close(embeds[0, mask[0, stream]], own[stream]), "each stream has the tokens of its prompt only"
    alone = sample(pipe, dynamics_prompt="spins")
    assert not close(mixed, both) and not close(mixed, alone)
    prompts = ["spins", "orbits"]
    several = sample(pipe, structure_prompt="a red disc", dynamics_prompt=prompts, seeds=[0, 0])
    assert close(several[:1], mixed)


def test_guidance_leads_away_from_the_negative_prompt(pipe):
    plain = sample(pipe, prompt="a red disc", guidance_scale=1.0)
    assert close(sample(pipe, prompt="a red disc", negative_prompt="a red disc", guidance_scale=4.0), plain)
    barely = sample(pipe, prompt="a red disc", negative_prompt="two dogs", guidance_scale=1 + 1e-6)
    assert close(barely, plain), "the prompts are those with the scale, not the negative ones"
    null = sample(pipe, prompt="a red disc", guidance_scale=4.0)
    assert close(sample(pipe, prompt="a red disc", negative_prompt="", guidance_scale=4.0), null)
    assert not close(sample(pipe, prompt="a red disc", negative_prompt="a blue star spins", guidance_scale=4.0), null)
    alone = sample(pipe, negative_prompt="a blue star", guidance_scale=4.0)
    assert not close(alone, sample(pipe))


def test_classes_stand_alone_or_beside_prompts(pipe):
    alone = sample(pipe, "Diving")
    beside = sample(pipe, "Diving", prompt=["a red disc", "two dogs"], seeds=[0, 0])
    assert not close(beside[:1], alone) and not close(beside[:1], sample(pipe, prompt="a red disc"))
    with pytest.raises(ValueError, match="prompt has length 2, but the batch size is 3: pass one, or 3"):
        sample(pipe, ["Diving"] * 3, prompt=["a", "b"])
    with pytest.raises(ValueError, match="structure_prompt has length 2, but the batch size is 3"):
        sample(pipe, prompt=["a"] * 3, structure_prompt=["a", "b"])


def test_a_model_without_classes_is_guided_by_prompts(vae, make_transformer, encoder):
    model = make_transformer(caption_channels=CHANNELS, num_classes=None)
    pipe = VidTwinPipeline(vae, model, default_scheduler(), text_encoder=encoder.model, tokenizer=encoder.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red disc", "two dogs"]
    videos = sample(pipe, prompt=prompts, seeds=[0, 1])
    assert close(videos[1:], sample(pipe, prompt="two dogs", seeds=[1]))
    assert not close(videos, sample(pipe, num_videos_per_prompt=2, seeds=[0, 1]))


def test_prompts_with_conditioning_and_rollout(pipe):
    image = torch.rand(1, 1, 3, 32, 32)
    first = sample(pipe, prompt=["a red disc", "two dogs"], image=image, seeds=[0, 0])
    assert not close(first[:1], first[1:]) and not close(first[:1], sample(pipe, prompt="a red disc"))
    moved = sample(pipe, prompt="a red disc", structure=torch.rand(2, 4, 3, 32, 32), seeds=[0, 1])
    assert moved.shape[0] == 2

    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"num_inference_steps": 2, "structure_prompt": "a ring", "num_videos_per_prompt": 2}
    videos = rollout(pipe, 7, dynamics_prompt=["spins", "orbits"], generator=generator, **options)
    assert videos.shape[:2] == (4, 7)
    embeds, mask, *_ = pipe.encode_prompt(structure_prompt="a ring", dynamics_prompt=["spins", "orbits"])
    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"num_inference_steps": 2, "prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert close(rollout(pipe, 7, generator=generator, num_videos_per_prompt=2, **options), videos)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n",
        "\x00\x1b[31m",
        "星が回る",
        "🙂👩‍👩‍👧 ünïcödé",
        "<script>alert(1)</script>",
        "'; rm -rf / #",
        "%s {0}",
    ],
)
def test_prompts_of_any_text_run(pipe, text):
    assert sample(pipe, prompt=text).isfinite().all()


def test_a_thousand_prompts_run_in_one_batch(pipe):
    prompts = [f"disc number {i}" for i in range(1000)]
    videos = pipe(prompt=prompts, num_inference_steps=1, output_type="latent", guidance_scale=1.0).frames
    assert videos.shape[0] == 1000 and videos.isfinite().all()


def test_a_long_prompt_is_cut_with_a_warning(pipe, caplog):
    long = "a red disc orbits " * 5000
    with caplog.at_level(logging.WARNING, logger="pipelines.text"):
        video = sample(pipe, prompt=long + "\x1b[2J")
    [record] = caplog.records
    assert "more than 24 tokens, and its end is ignored" in record.getMessage()
    assert "\x1b" not in record.getMessage() and len(record.getMessage()) < 400
    assert torch.equal(sample(pipe, prompt=long), video)
    caplog.clear()
    embeds, mask, *_ = pipe.encode_prompt("a red disc orbits", max_sequence_length=2)
    assert embeds.shape[1] == 2 and mask.all() and caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 3}, "prompt must be a text or a list of texts, not int"),
        ({"prompt": ["a", None]}, r"prompt must be a text or a list of texts, but prompt\[1\] is None"),
        ({"negative_prompt": ["a", 3]}, r"negative_prompt must be .*, but negative_prompt\[1\] is 3\."),
        ({"prompt": "a \udcff star"}, r"The text 'a \\udcff star' is not valid Unicode: its character 3 is the surr"),
        ({"prompt": "a", "max_sequence_length": 0}, "max_sequence_length must be at least 1, not 0"),
        ({"prompt": "a", "max_sequence_length": 2.5}, "max_sequence_length must be a whole number"),
        ({"prompt": []}, "prompt is empty: pass at least one text"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 2, 16)}, "prompt and prompt_embeds exclude each other"),
        ({"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 2, 16)}, "negative_prompt and negative"),
        ({"prompt_embeds": torch.zeros(1, 2, 8)}, r"prompt_embeds must be a tensor \(B, N, 16\), not \(1, 2, 8\)"),
        ({"prompt_embeds": torch.full((1, 2, 16), torch.nan)}, "prompt_embeds contains NaN"),
        ({"prompt_attention_mask": torch.ones(1, 2)}, "prompt_attention_mask requires prompt_embeds"),
        (
            {"prompt_embeds": torch.zeros(1, 2, 16), "prompt_attention_mask": torch.ones(1, 3)},
            r"prompt_attention_mask must be \(1, 2\) or \(1, 2, 2\), not \(1, 3\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        sample(pipe, **options)


def test_a_model_without_captions_refuses_prompts_and_encoders(vae, make_transformer, encoder):
    plain = VidTwinPipeline(vae, make_transformer(), default_scheduler())
    with pytest.raises(ValueError, match="was not trained on captions: leave prompt out"):
        plain(prompt="a disc")
    with pytest.raises(ValueError, match="was built for captions of no channels, but the text encoder has 16"):
        VidTwinPipeline(vae, make_transformer(), default_scheduler(), text_encoder=encoder.model)


@pytest.mark.parametrize("how", ["resident", "model_offload", "group_offload"])
def test_the_text_encoder_executes_on_its_device_unless_it_is_offloaded(vae, transformer, how, monkeypatch, tmp_path):
    """A pipeline on an accelerator, here "meta", can keep its text encoder on the CPU."""
    encoder = tiny_text_encoder()
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    pipe = VidTwinPipeline(deepcopy(vae), deepcopy(transformer), default_scheduler(), **parts)
    expected, cpu = pipe.encode_prompt("a red disc")[0], torch.device("cpu")
    if how == "model_offload":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "group_offload":
        pipe.enable_group_offload(cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert torch.equal(pipe.encode_prompt("a red disc")[0], expected)
    meta = torch.device("meta")
    monkeypatch.setattr(VidTwinPipeline, "_execution_device", meta)
    assert pipe._text_encoder_device == (cpu if how == "resident" else meta)
    if how == "resident":
        assert torch.equal(pipe.encode_prompt("a red disc", device=cpu)[0], expected)


# --- encoders and saved pipelines ------------------------------------------------------------------------------------


def test_equal_captions_have_equal_embeddings_in_any_batch(encoder):
    embeddings, mask, cut = encode_captions(["a ring", "", "a red disc orbits", "a ring"], encoder)
    assert torch.equal(embeddings[0], embeddings[3]) and not cut
    assert mask.sum(dim=1).tolist()[1] == 0 and embeddings.isfinite().all()
    alone, _, _ = encode_captions(["a ring"], encoder)
    assert close(embeddings[0, : alone.shape[1]], alone[0])


def test_the_tokenizer_ignores_case_and_blanks(encoder):
    ids, _, _ = tokenize_captions(["A  Red\nDisc", "a red disc"], encoder.tokenizer)
    assert torch.equal(ids[0], ids[1])
    ids, mask, _ = tokenize_captions(["星 🙂"], encoder.tokenizer)
    assert encoder.tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "星 🙂" and mask.all()


def test_captions_with_surrogates_are_refused(encoder):
    with pytest.raises(ValueError, match=r"'two \\ud800' is not valid Unicode: its character 5 is the surrogate"):
        encode_captions(["a ring", "two \ud800"], encoder)


def test_a_saved_pipeline_has_its_text_encoder(pipe, tmp_path):
    video = sample(pipe, prompt="a red disc spins")
    pipe.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    loaded = VidTwinPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(loaded, prompt="a red disc spins"), video)
    assert loaded.tokenizer.model_max_length == 24
    assert "text-to-video" in str(loaded.model_card("me/mine")) and 'prompt="..."' in str(loaded.model_card("me/mine"))
    without = VidTwinPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert without.text_encoder is None


def test_a_pipeline_without_text_loads_with_and_without_entries_of_an_encoder(vae, make_transformer, tmp_path):
    VidTwinPipeline(vae, make_transformer(), default_scheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in ("text_encoder", "tokenizer"):  # earlier versions wrote neither
        assert index.pop(name) == [None, None] and not (tmp_path / name).exists()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert VidTwinPipeline.from_pretrained(tmp_path).text_encoder is None
