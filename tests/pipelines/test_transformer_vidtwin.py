from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig

from autoencoder import TwinLatents
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.blocks import modulate
from pipelines.latents import normalize_latents
from pipelines.presets import PRESETS

BATCH = 2


@pytest.fixture
def inputs(transformer):
    torch.manual_seed(2)
    noisy = torch.randn(BATCH, transformer.latent_size)
    return {"hidden_states": noisy, "timestep": torch.tensor([7, 900]), "class_labels": torch.tensor([0, 3])}


def split(model, packed):
    """Packed (B, L) -> structure (B, L_S) and dynamics (B, L_D)."""
    return packed.split([torch.Size(model.structure_shape).numel(), torch.Size(model.dynamics_shape).numel()], dim=1)


def test_token_counts_of_the_paper():
    with torch.device("meta"):
        assert VidTwinTransformer3DModel.from_preset("tiny-test").num_tokens == (784, 224)
        folded = VidTwinTransformer3DModel.from_preset(
            "tiny-test", structure_patch_size=(16, 1, 1), dynamics_patch_size=(1, 14)
        )
    assert sum(folded.num_tokens) == 65
    assert folded.structure_embed.proj.in_features == 64
    assert folded.dynamics_embed.proj.in_features == 112


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_take_shapes_from_the_autoencoder(name, vae):
    with torch.device("meta"):
        model = VidTwinTransformer3DModel.from_preset(name, vae=vae, num_classes=5)
    assert model.structure_shape == vae.structure_shape
    assert model.dynamics_shape == vae.dynamics_shape
    assert model.latent_size == vae.latent_size


def test_dit_sizes():
    """DiT-B has 130 million parameters; ours adds little."""
    with torch.device("meta"):
        assert round(VidTwinTransformer3DModel.from_preset("B").num_parameters() / 1e6) == 130


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention"])
def test_a_fresh_model_predicts_zero(vae, conditioning):
    model = VidTwinTransformer3DModel.from_preset("tiny-test", vae, num_classes=3, class_conditioning=conditioning)
    sample = model(torch.randn(BATCH, vae.latent_size), torch.tensor([1, 2]), torch.tensor([0, 1])).sample
    assert sample.shape == (BATCH, vae.latent_size)
    assert not sample.any()


def test_one_timestep_is_the_same_for_both_streams(transformer, inputs):
    one = transformer(**inputs).sample
    two = transformer(**{**inputs, "timestep": inputs["timestep"][:, None].repeat(1, 2)}).sample
    assert torch.equal(one, two)


@pytest.mark.parametrize("stream", [0, 1])
def test_each_streams_timestep_reaches_both(transformer, inputs, stream):
    timestep = torch.full((BATCH, 2), 300)
    before = transformer(**{**inputs, "timestep": timestep}).sample
    timestep[:, stream] = 0
    after = transformer(**{**inputs, "timestep": timestep}).sample
    for a, b in zip(split(transformer, before), split(transformer, after), strict=True):
        assert (a - b).abs().amax() > 1e-4


def test_each_stream_is_modulated_by_its_own_vectors():
    ones = torch.ones(1, 5, 2)
    scale, shift = torch.tensor([[[2.0, 3.0], [4.0, 5.0]]]), torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    out = modulate(ones, (2, 3), scale, shift)
    assert out[0].tolist() == [[12, 23]] * 2 + [[34, 45]] * 3
    assert modulate(ones, (2, 3), scale)[0].tolist() == [[2, 3]] * 2 + [[4, 5]] * 3


@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_qk_norm_makes_the_scale_of_queries_and_keys_irrelevant(make_transformer, inputs, qk_norm):
    model = make_transformer(qk_norm=qk_norm)
    before = model(**inputs).sample
    with torch.no_grad():
        for layer in (model.transformer_blocks[0].attn1.to_q, model.transformer_blocks[0].attn1.to_k):
            layer.weight.mul_(4)
            layer.bias.mul_(4)
    unchanged = torch.allclose(model(**inputs).sample, before, atol=1e-4, rtol=1e-4)
    assert unchanged == (qk_norm is not None)


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention"])
def test_the_output_depends_on_the_class(make_transformer, inputs, conditioning):
    model = make_transformer(class_conditioning=conditioning)
    labels = [model(**{**inputs, "class_labels": torch.full((BATCH,), i)}).sample for i in range(4)]
    for i in range(3):
        assert (labels[i] - labels[i + 1]).abs().amax() > 1e-4


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention"])
@pytest.mark.parametrize("per_stream", [False, True])
def test_modulations_of_many_steps_equal_those_of_each(make_transformer, inputs, conditioning, per_stream):
    model = make_transformer(class_conditioning=conditioning)
    timesteps = torch.tensor([[900.0, 100.0], [3.0, 3.0]]) if per_stream else torch.tensor([900.0, 3.0])
    labels = inputs["class_labels"]
    together = model.modulations(timesteps.repeat_interleave(BATCH, 0), labels.repeat(2))
    for i, timestep in enumerate(timesteps):
        asked = {**inputs, "timestep": timestep.expand(BATCH, *timestep.shape)}
        given = [layer[i * BATCH : (i + 1) * BATCH] for layer in together]
        torch.testing.assert_close(
            model(**asked, modulations=given).sample, model(**asked).sample, atol=1e-5, rtol=1e-5
        )
    with pytest.raises(ValueError, match="class_labels"):
        model.modulations(timesteps)


def test_every_latent_value_reaches_both_streams(transformer, inputs):
    hidden_states = inputs["hidden_states"].requires_grad_()
    sample = transformer(**{**inputs, "hidden_states": hidden_states}).sample
    for out in split(transformer, sample):
        (grad,) = torch.autograd.grad(out.square().sum(), hidden_states, retain_graph=True)
        assert (grad.abs() > 0).all()


def test_locations_are_distinguished(transformer, inputs):
    """Without positions, moving the latents' values about would only move the prediction about."""
    latents = TwinLatents.unpack(inputs["hidden_states"], transformer.structure_shape, transformer.dynamics_shape)
    turned = TwinLatents(latents.structure.flip(2), latents.dynamics.flip(2))
    before, after = (
        TwinLatents.unpack(
            transformer(**{**inputs, "hidden_states": x.pack()}).sample,
            transformer.structure_shape,
            transformer.dynamics_shape,
        )
        for x in (latents, turned)
    )
    assert (after.structure.flip(2) - before.structure).abs().max() > 1e-2
    assert (after.dynamics.flip(2) - before.dynamics).abs().max() > 1e-2


def test_clips_of_a_batch_are_independent(transformer, inputs):
    together = transformer(**inputs).sample
    alone = [transformer(**{k: v[i : i + 1] for k, v in inputs.items()}).sample for i in range(BATCH)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_self_conditioning(make_transformer, inputs, vae):
    model = make_transformer(self_conditioning=True)
    estimate = torch.randn(BATCH, vae.latent_size)
    without = model(**inputs).sample
    assert torch.equal(without, model(**inputs, self_condition=torch.zeros_like(estimate)).sample)
    for a, b in zip(split(model, without), split(model, model(**inputs, self_condition=estimate).sample), strict=True):
        assert (a - b).abs().amax() > 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_hidden_states_are_the_outputs_of_blocks(make_transformer, inputs, checkpointing):
    model = make_transformer(num_layers=3).train(checkpointing)
    if checkpointing:
        model.enable_gradient_checkpointing()
    expected = model(**inputs)
    assert expected.hidden_states is None and len(expected.to_tuple()) == 1
    outputs = []
    handles = [
        block.register_forward_hook(lambda *args: outputs.append(args[-1])) for block in model.transformer_blocks
    ]
    with_states = model(**inputs, hidden_layers=(3, 1))
    assert torch.equal(with_states.sample, expected.sample)
    assert [torch.equal(a, outputs[i]) for a, i in zip(with_states.hidden_states, (0, 2), strict=True)] == [True] * 2
    for handle in handles:
        handle.remove()
    sample, states = model(**inputs, hidden_layers=(2,), return_dict=False)
    assert torch.equal(sample, expected.sample) and torch.equal(states[0], outputs[1])
    with pytest.raises(ValueError, match="hidden_layers must be 1 to 3"):
        model(**inputs, hidden_layers=(0,))


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention"])
def test_gradient_checkpointing_changes_nothing(make_transformer, inputs, conditioning):
    model = make_transformer(class_conditioning=conditioning).train()
    results = []
    for checkpointing in (False, True):
        calls = []
        if checkpointing:
            model.enable_gradient_checkpointing()
            function = model._gradient_checkpointing_func
            model._gradient_checkpointing_func = lambda *args, f=function, calls=calls: (calls.append(1), f(*args))[1]
        model.zero_grad()
        loss = model(**inputs).sample.square().mean()
        loss.backward()
        results.append((loss.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}))
    assert len(calls) == len(model.transformer_blocks)
    (loss, grads), (loss_checkpointed, grads_checkpointed) = results
    torch.testing.assert_close(loss, loss_checkpointed, atol=1e-5, rtol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_checkpointed[name], atol=5e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"class_conditioning": "cross_attention"}, {"self_conditioning": True, "qk_norm": None}],
    ids=["adaln", "cross_attention", "self_conditioning"],
)
def test_saving_and_loading_is_bit_equal(make_transformer, inputs, tmp_path, overrides):
    model = make_transformer(**overrides)
    model.save_pretrained(tmp_path)
    loaded = VidTwinTransformer3DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(model(**inputs).sample, loaded(**inputs).sample)


def test_bfloat16(transformer, inputs, tmp_path):
    transformer.save_pretrained(tmp_path)
    loaded = VidTwinTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    half = loaded(**{**inputs, "hidden_states": inputs["hidden_states"].bfloat16()}).sample
    full = transformer(**inputs).sample
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().max() < 0.05 * full.abs().max()


def test_autocast_keeps_the_residual_stream_in_float32(transformer, inputs):
    seen = []
    hook = transformer.transformer_blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        sample = transformer(**inputs).sample
    hook.remove()
    assert seen == [torch.float32]
    full = transformer(**inputs).sample
    assert (sample - full).abs().max() < 0.05 * full.abs().max()


def test_fused_projections_change_nothing(make_transformer, inputs):
    model = make_transformer(class_conditioning="cross_attention")
    before = model(**inputs).sample
    model.fuse_qkv_projections()
    assert hasattr(model.transformer_blocks[0].attn1, "to_qkv")
    torch.testing.assert_close(model(**inputs).sample, before, atol=1e-5, rtol=1e-5)


def test_compiles_as_one_graph(transformer, inputs):
    compiled = torch.compile(transformer, fullgraph=True, backend="eager")
    for layers in ((), (1, 2)):
        ours, expected = (model(**inputs, hidden_layers=layers).to_tuple() for model in (compiled, transformer))
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_layerwise_casting(make_transformer, inputs):
    model = make_transformer()
    full = model(**inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert model.structure_embed.proj.weight.dtype == torch.float32
    assert (model(**inputs).sample - full).abs().max() < 0.05 * full.abs().max()


def test_attention_caches_skip_work(make_transformer, inputs):
    model = make_transformer()
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    calls = []
    model.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: calls.append(1))
    model.enable_cache(config)
    for _ in range(4):
        model(**inputs)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"structure_patch_size": (2, 1, 1)}, r"structure_patch_size \(2, 1, 1\) must divide .* \(3, 2, 2\)"),
        ({"dynamics_patch_size": (1, 3)}, r"dynamics_patch_size \(1, 3\) must divide .* \(4, 4\)"),
        ({"dynamics_patch_size": (1, 1, 1)}, r"dynamics_patch_size"),
        ({"class_conditioning": "film"}, "film"),
        ({"qk_norm": "layer_norm"}, "layer_norm"),
    ],
)
def test_wrong_sizes_and_options_are_named(make_transformer, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_transformer(**overrides)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        VidTwinTransformer3DModel.from_preset("tinny")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(BATCH, 5)}, r"\(B, 176\)"),
        ({"timestep": torch.zeros(BATCH, 3)}, r"\(2,\) or \(2, 2\)"),
        ({"timestep": torch.zeros(())}, r"\(2,\) or \(2, 2\)"),
        ({"class_labels": None}, "requires class_labels"),
        ({"self_condition": torch.zeros(BATCH, 176)}, "self_conditioning"),
    ],
)
def test_wrong_inputs_are_named(transformer, inputs, change, message):
    with pytest.raises(ValueError, match=message):
        transformer(**{**inputs, **change})


def test_an_unconditional_model_takes_no_labels(make_transformer, inputs):
    model = make_transformer(num_classes=None)
    with pytest.raises(ValueError, match="unconditional"):
        model(**inputs)
    assert model(inputs["hidden_states"], inputs["timestep"]).sample.any()


def test_learns_four_latents_and_samples_them(vae):
    """A fresh tiny model overfits four clips, one per class: the x0 loss halves, and sampling gives the clips back."""
    torch.manual_seed(0)
    scheduler = default_scheduler()
    model = VidTwinTransformer3DModel.from_preset("tiny-test", vae, num_classes=4)
    clean, labels = torch.randn(4, vae.latent_size), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        timestep = torch.randint(1000, (4,))
        noisy = scheduler.add_noise(clean, torch.randn_like(clean), timestep)
        loss = (model(noisy, timestep, labels).sample - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]

    pipe = VidTwinPipeline(vae, model.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe([0, 1, 2, 3], guidance_scale=1.0, num_inference_steps=10, output_type="latent").frames
    error = (normalize_latents(latents, vae) - clean).square().mean(dim=1)
    assert error.max() < 0.2  # standard normal latents: a wrong clip would be at 2


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_model_without_images_gains_them_unchanged(vae, transformer, inputs):
    """New image conditioning starts at zero."""
    model = VidTwinTransformer3DModel.from_preset("tiny-test", vae, num_classes=3, image_conditioning=True).eval()
    missing, unexpected = model.load_state_dict(transformer.state_dict(), strict=False)
    assert missing == ["image_embed.weight", "image_embed.bias"] and not unexpected
    image, _ = split(model, torch.randn(BATCH, model.latent_size))
    assert torch.equal(model(**inputs, image_latents=image).sample, transformer(**inputs).sample)


@torch.no_grad()
def test_an_image_changes_the_clips_that_have_one(make_transformer, inputs):
    model = make_transformer(image_conditioning=True)
    image, _ = split(model, torch.randn(BATCH, model.latent_size))
    without, with_image = model(**inputs).sample, model(**inputs, image_latents=image).sample
    assert ((with_image - without).abs().amax(dim=1) > 1e-3).all()
    some = model(**inputs, image_latents=image, image_mask=torch.tensor([True, False])).sample
    torch.testing.assert_close(some, torch.stack([with_image[0], without[1]]))
    black = model(**inputs, image_latents=torch.zeros_like(image)).sample
    assert not torch.allclose(black, without)  # an image of zeros is not the absence of one


def test_images_that_do_not_fit_are_errors(make_transformer, transformer, inputs):
    image, dynamics = split(transformer, inputs["hidden_states"])
    with pytest.raises(ValueError, match="no image_conditioning: leave image_latents out"):
        transformer(**inputs, image_latents=image)
    with pytest.raises(ValueError, match=rf"image_latents must be \(B, {image.shape[1]}\)"):
        make_transformer(image_conditioning=True)(**inputs, image_latents=dynamics)


# --- intervals -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_without_intervals_gains_them_unchanged(vae, transformer, inputs):
    """New interval conditioning starts at zero."""
    model = VidTwinTransformer3DModel.from_preset("tiny-test", vae, num_classes=3, interval_conditioning=True).eval()
    missing, unexpected = model.load_state_dict(transformer.state_dict(), strict=False)
    assert all(name.startswith("interval_embed.") for name in missing) and not unexpected
    target = inputs["timestep"] // 2
    assert torch.equal(model(**inputs, target_timestep=target).sample, transformer(**inputs).sample)


@torch.no_grad()
def test_each_stream_has_an_interval(make_transformer, inputs):
    model = make_transformer(interval_conditioning=True)
    timestep = inputs["timestep"]
    assert torch.equal(model(**inputs, target_timestep=timestep).sample, model(**inputs).sample)
    both, one = timestep - 10, torch.stack([timestep, timestep - 10], dim=1)
    outputs = [model(**inputs).sample, *(model(**inputs, target_timestep=target).sample for target in (both, one))]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == 3
    # The embedding is of the difference, and of the other stream's as well.
    embed = model.interval_embed
    interval = torch.tensor([[5.0, 20.0], [20.0, 5.0]])
    first, second = embed(interval, torch.float32)
    torch.testing.assert_close(first, second.flip(0))
    modulations = model.modulations(timestep, inputs["class_labels"], one)
    torch.testing.assert_close(model(**inputs, target_timestep=one, modulations=modulations).sample, outputs[2])


def test_intervals_that_do_not_fit_are_errors(make_transformer, transformer, inputs):
    with pytest.raises(ValueError, match="no interval_conditioning: leave target_timestep out"):
        transformer(**inputs, target_timestep=inputs["timestep"])
    with pytest.raises(ValueError, match="target_timestep must be"):
        make_transformer(interval_conditioning=True)(**inputs, target_timestep=torch.zeros(7))


@pytest.mark.parametrize("kind", ["adaln", "cross_attention"])
def test_new_class_vectors_have_the_configured_deviation(kind):
    build = partial(VidTwinTransformer3DModel.from_preset, "tiny-test", num_classes=400, class_conditioning=kind)
    for model, deviation in ((build(), 0.02), (build(class_embed_std=0.5), 0.5)):
        embed = model.class_embed if kind == "cross_attention" else model.condition_embed.class_embed
        assert embed.weight.std().item() == pytest.approx(deviation, rel=0.05)
