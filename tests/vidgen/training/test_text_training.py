"""Training on captions: a small encoder trained with the DiT, frozen encoders, parents, LoRA, resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_processes import assert_near, finish, start
from tiny_text import tiny_text_encoder

from pipelines import VidTwinPipeline
from pipelines.text import encode_captions
from runs import assert_same_run, assert_same_tensors, from_parent, numbers
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.loading import SPRITES_MODEL, load_pipeline, load_text_encoder, text_encoder_hash
from vidgen.data.captions import read_captions
from vidgen.data.config import TextConfig
from vidgen.data.listing import list_videos
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.dit_trainer import DiTTrainer, encode_latents, train_dit
from vidgen.training.pretrained import Parent, read_pipeline
from vidgen.training.text import check_parent, check_parent_sizes, load_encoder, load_frozen_encoder

SMALL = ["text.encoder=small", "text.hidden_size=16", "text.num_layers=1", "text.num_attention_heads=2"]
STEADY = "optim.lr_scheduler=constant_with_warmup"
SHORT_RUN = (
    "train.checkpointing_steps=2",
    "train.ema_decay=0.5",
    "data.hold_out=true",
    "text.max_length=5",
    STEADY,
)


@pytest.fixture(scope="session")
def captioned(sprites, tmp_path_factory) -> Path:
    """A CSV of the sprites with classes, and with two captions each."""
    lines = ["path,label,caption"]
    for path in sorted(sprites.rglob("*.mp4")):
        motion = path.parent.name
        lines.append(f"{path},{motion},a shape {motion}s|das Bild 星 „{motion}“")
    table = tmp_path_factory.mktemp("captions") / "list.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    return table


@pytest.fixture(scope="session")
def text_config(dit_config, captioned):
    def make(output_dir, *overrides, encoder=SMALL):
        return dit_config(output_dir, f"data.root={captioned}", "train.max_train_steps=4", *encoder, *overrides)

    return make


@pytest.fixture(scope="session")
def trained(text_config, tmp_path_factory) -> Path:
    """A pipeline of a short run with a small encoder."""
    folder = tmp_path_factory.mktemp("text") / "run"
    return train_dit(text_config(folder, *SHORT_RUN))


def sample(pipeline: VidTwinPipeline, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=2, output_type="latent", generator=generator, **options).frames


def test_a_small_encoder_is_trained_averaged_and_saved(trained):
    run = trained.parent
    pipeline = load_pipeline(str(trained))
    assert sorted(path.name for path in trained.iterdir() if path.is_dir()) == [
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae"
    ]  # fmt: skip
    assert pipeline.transformer.config.caption_channels == 16 and pipeline.tokenizer.model_max_length == 5
    assert "orbit" in pipeline.labels and sample(pipeline, class_labels="orbit").isfinite().all()
    prompts = ["a shape spins", "das Bild 星 „orbit“"]
    assert sample(pipeline, structure_prompt=prompts, dynamics_prompt="swaps").isfinite().all()

    average = load_file(run / "checkpoint-4" / "ema.safetensors")
    last = load_file(run / "checkpoint-4" / "model.safetensors")
    first = load_file(run / "checkpoint-2" / "model.safetensors")
    encoder = load_file(trained / "text_encoder" / "model.safetensors")
    for name, weight in encoder.items():
        assert torch.equal(average[f"text_encoder.{name}"], weight)
    name = "text_encoder.transformer.layer.0.ffn.lin1.weight"
    assert not torch.equal(last[name], first[name]) and not torch.equal(last[name], average[name])
    for weight in (
        pipeline.transformer.transformer_blocks[0].attn3.to_out.weight,
        pipeline.transformer.caption_embed.null_token,
    ):
        assert weight.abs().sum() > 0
    assert (run / "samples" / "step-4.gif").exists()
    assert {"validation/loss", "validation/structure"} < set(numbers(run)[4])


def test_a_run_resumes_bit_for_bit(text_config, trained, tmp_path, captioned, capsys):
    run, cut = trained.parent, tmp_path / "cut"
    shutil.copytree(run / "checkpoint-2", cut / "checkpoint-2")
    shutil.copytree(run / "text", cut / "text")
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 2' in line or '"step": 1' in line))
    train_dit(text_config(cut, *SHORT_RUN, "resume=latest"))
    assert_same_run(run, cut)
    assert "captions are cut at text.max_length=5 tokens" in capsys.readouterr().out

    # Other captions give another tokenizer, for which the weights are useless.
    other = captioned.with_name("other.csv")
    other.write_text(captioned.read_text().replace("shape", "figure"))
    shutil.rmtree(cut / "text")
    settings = [*SHORT_RUN, "resume=latest", "train.max_train_steps=5"]
    settings += [f"data.root={other}", f"latent_cache={tmp_path / 'other'}"]
    with pytest.raises(UserError, match="cannot be resumed, because tokenizer changed"):
        train_dit(text_config(cut, *settings))


def test_latents_are_scaled_by_their_response_beside_captions(text_config, tmp_path):
    final = train_dit(text_config(tmp_path, "latents.statistics=response", "train.max_train_steps=1"))
    assert load_pipeline(str(final)).config.latents_std is not None


def test_captions_are_drawn_by_epoch(text_config, captioned, tmp_path, monkeypatch):
    seen = []
    compute = DiTTrainer.compute_losses
    monkeypatch.setattr(
        DiTTrainer, "compute_losses", lambda self, batch: seen.append((self, batch)) or compute(self, batch)
    )
    train_dit(text_config(tmp_path, "train.max_train_steps=2", "train.train_batch_size=16"))
    captions = read_captions(captioned, list_videos(captioned)[0])
    epochs = []
    for trainer, batch in seen:
        tokens = zip(batch["text"], batch["text_mask"], strict=True)
        texts = [
            trainer.text_encoder.tokenizer.decode(ids[mask], skip_special_tokens=True).strip() for ids, mask in tokens
        ]
        epochs.append(dict(zip(batch["index"].tolist(), texts, strict=True)))
        for index, text in epochs[-1].items():
            assert text in [caption.lower() for caption in captions[index]]
    assert epochs[0].keys() == epochs[1].keys() and epochs[0] != epochs[1]


def test_a_frozen_encoder_is_cached_and_saved(text_config, tmp_path):
    encoders = {"first": tiny_text_encoder(hidden_size=16), "other": tiny_text_encoder(("x", "y"), hidden_size=16)}
    for name, encoder in encoders.items():
        for part in encoder:
            part.save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")

    def config(steps: int, encoder: str, cache: str = "cache", *settings: str):
        settings = [f"latent_cache={tmp_path / cache}", f"train.max_train_steps={steps}", "resume=latest", *settings]
        return text_config(tmp_path / "run", *settings, encoder=[f"text.encoder={tmp_path / encoder}"])

    encode_latents(config(1, "first"))
    assert (tmp_path / "cache" / "captions.safetensors").exists()
    final = train_dit(config(1, "first"))
    saved = load_text_encoder(str(final))
    assert text_encoder_hash(saved) == text_encoder_hash(encoders["first"])
    assert "text_encoder" not in "".join(load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors"))
    assert sample(load_pipeline(str(final)), prompt="a shape spins").isfinite().all()

    train_dit(config(2, "copy"))  # the same encoder in another folder
    with pytest.raises(UserError, match=r"captions in .*cache are cached for another text encoder"):
        train_dit(config(3, "other"))
    with pytest.raises(UserError, match=r"cannot be resumed, because .*text encoder changed"):
        train_dit(config(3, "other", "other-cache"))


@pytest.mark.parametrize(
    ("family", "positions", "max_length"),
    [("Bert", 32, 32), ("Roberta", 32, 31), ("CLIPText", 16, 16), ("T5Encoder", None, 128)],
)
def test_captions_are_cut_at_the_positions_of_a_frozen_encoder(tmp_path, family, positions, max_length):
    """For a tokenizer without a maximum; the positions of RoBERTa begin after that of padding."""
    sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes |= dict(max_position_embeddings=positions, pad_token_id=0)
    if positions is None:
        sizes = dict(vocab_size=300, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = getattr(transformers, f"{family.removesuffix('Encoder')}Config")(**sizes)
    getattr(transformers, f"{family}Model")(config).save_pretrained(tmp_path)
    tokenizer = tiny_text_encoder().tokenizer
    tokenizer.model_max_length = transformers.tokenization_utils_base.VERY_LARGE_INTEGER
    tokenizer.save_pretrained(tmp_path)

    encoder = load_frozen_encoder(TextConfig(str(tmp_path)), "cpu")
    assert encoder.tokenizer.model_max_length == max_length
    embeddings, mask, cut = encode_captions(["a red disc orbits " * 100], encoder, 128)
    assert embeddings.shape == (1, max_length, 16) and embeddings.isfinite().all() and mask.all() and len(cut) == 1
    encoder = load_frozen_encoder(TextConfig(str(tmp_path), max_length=9), "cpu")
    assert encoder.tokenizer.model_max_length == 9


def test_captions_can_be_added_to_a_class_only_parent(text_config, trained_dit, tmp_path):
    parent = load_pipeline(str(trained_dit))
    settings = from_parent(trained_dit, "train.max_train_steps=0", "train.ema_decay=0")
    settings.append("model.overrides={caption_pooling: true}")
    start = load_pipeline(str(train_dit(text_config(tmp_path, *settings))))
    for options in ({"class_labels": "orbit"}, {"class_labels": ["spin", "swap"], "guidance_scale": (2.0, 3.0)}):
        assert torch.equal(sample(start, **options), sample(parent, **options))
    assert torch.equal(sample(start, class_labels="orbit", prompt="a shape"), sample(parent, class_labels="orbit"))


def test_a_parent_with_captions_keeps_its_encoder(text_config, trained, dit_config, tmp_path, capsys):
    start = train_dit(text_config(tmp_path / "start", *from_parent(trained, "train.max_train_steps=0")))
    assert "captions are cut at 5 tokens, the maximum of the text encoder." in capsys.readouterr().out
    for part in ("text_encoder", "transformer"):
        assert_same_tensors(trained / part, start / part)
    with pytest.raises(UserError, match=r"A DiT with caption_channels is trained on captions: set text\.encoder"):
        train_dit(dit_config(tmp_path / "none", *from_parent(trained)))
    with pytest.raises(UserError, match=r"trains no text encoder; set text\.encoder to the folder of a pipeline"):
        train_dit(text_config(tmp_path / "lora", *from_parent(trained), "lora.rank=2"))
    for part in tiny_text_encoder(hidden_size=24):
        part.save_pretrained(tmp_path / "wide")
    for name, settings, message in (
        ("sizes", ["text.num_layers=2"], r"text\.num_layers is 2, .* which is trained further, has 1: leave it out"),
        ("wide", [f"text.encoder={tmp_path / 'wide'}"], r"captions of 16 channels, .* of text\.encoder have 24"),
    ):
        with pytest.raises(UserError, match=message):
            train_dit(text_config(tmp_path / f"run-{name}", *from_parent(trained), *settings))
        assert not (tmp_path / f"run-{name}" / "latents").exists(), "refused before the latents are encoded"


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        ("hidden_size=24", 16),
        ("num_layers=2", 1),
        ("num_attention_heads=1", 2),
        ("vocab_size=270", 300),
        ("max_length=25", 24),
    ],
)
def test_sizes_of_a_small_encoder_that_is_kept_cannot_be_set(text_config, tmp_path, setting, size):
    encoder = tiny_text_encoder()
    assert len(encoder.tokenizer) == 300
    equal = [*SMALL, "text.vocab_size=300", "text.max_length=24"]
    for settings in (equal, [*SMALL, "text.vocab_size=4000", "text.max_length=9"], ["text.encoder=small"]):
        check_parent_sizes(text_config(tmp_path, encoder=settings).text, encoder, "mine")
    config = text_config(tmp_path, encoder=[*equal, f"text.{setting}"])
    message = rf"^text\.{setting.replace('=', ' is ')}, but .* model\.pretrained=mine, .* has {size}: leave it out"
    with pytest.raises(UserError, match=message):
        check_parent_sizes(config.text, encoder, "mine")


def test_the_config_of_the_sprites_fits_the_pretrained_pipeline(tmp_path):
    path = Path(__file__).parents[3] / "configs" / "dit" / "sprites_text.yaml"
    settings = [f"model.pretrained={SPRITES_MODEL}", "vae=none", "data.root=none", f"output_dir={tmp_path}"]
    config = load_config(DiTTrainingConfig, ["--config", str(path), *settings])
    encoder = load_encoder(config, read_pipeline(config.model), "cpu")
    assert encoder.model.config.dim == config.text.hidden_size == 96


def test_held_out_videos_need_no_captions(text_config, sprites, tmp_path):
    """Their loss is that of the null token; samples have the captions of the training videos."""
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in sorted(sprites.rglob("*.mp4"))[:2]:
        shutil.copy(path, plain / path.name)
    settings = [f"data.validation_root={plain}", "train.max_train_steps=1"]
    for part in tiny_text_encoder():
        part.save_pretrained(tmp_path / "frozen")
    for name, encoder in (("small", SMALL), ("frozen", [f"text.encoder={tmp_path / 'frozen'}"])):
        train_dit(text_config(tmp_path / name, *settings, encoder=encoder))
        assert numbers(tmp_path / name)[1]["validation/loss"] > 0
        assert (tmp_path / name / "samples" / "step-1.gif").exists()
    with pytest.raises(UserError, match=rf"text\.encoder is set, but no video of {plain} has a caption"):
        train_dit(text_config(tmp_path / "none", f"data.root={plain}"))
    assert not (tmp_path / "none" / "latents").exists(), "refused before the latents are encoded"


def test_a_parent_is_compared_with_the_text_encoder(text_config, tmp_path):
    encoder, other = tiny_text_encoder(), tiny_text_encoder(("x", "y"))
    config = text_config(tmp_path, encoder=["text.encoder=folder"])
    parent = Parent("mine", "", {"caption_channels": 16}, text_encoder=text_encoder_hash(encoder))
    assert check_parent(config, parent, encoder) is None
    assert "is not the text encoder that mine was trained with" in check_parent(config, parent, other)
    assert check_parent(text_config(tmp_path), parent, other) is None, "one that is trained changes"
    wide = tiny_text_encoder(hidden_size=24)
    with pytest.raises(UserError, match=r"captions of 16 channels, but the token embeddings of text\.encoder have 24"):
        check_parent(config, parent, wide)
    lora = text_config(tmp_path, "lora.rank=2", encoder=["text.encoder=folder"])
    assert check_parent(config, Parent("mine", "", {}), wide) is None
    with pytest.raises(UserError, match=r"lora\.rank trains no attention to captions, which mine does not have"):
        check_parent(lora, Parent("mine", "", {}), wide)
    pooling = "model.overrides={caption_pooling: true}"
    lora = text_config(tmp_path, "lora.rank=2", pooling, encoder=["text.encoder=folder"])
    with pytest.raises(UserError, match=r"lora\.rank does not train model\.overrides\.caption_pooling"):
        check_parent(lora, parent, encoder)
    check_parent(lora, Parent("mine", "", {**parent.config, "caption_pooling": True}), encoder)


def test_lora_adapts_the_attention_to_captions(text_config, trained, tmp_path):
    pytest.importorskip("peft")
    settings = [*from_parent(trained), f"text.encoder={trained}", "lora.rank=2", "train.max_train_steps=1"]
    final = train_dit(text_config(tmp_path, *settings, encoder=[]))
    names = "".join(load_file(final / "pytorch_lora_weights.safetensors"))
    assert "transformer_blocks.0.attn3.to_k" in names and "text_encoder" not in names
    pipeline = load_pipeline(str(trained))
    before = sample(pipeline, prompt="a shape spins")
    pipeline.load_lora_weights(str(final))
    assert not torch.equal(sample(pipeline, prompt="a shape spins"), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["text.caption_dropout=0.9"], r"fractions of the same clips, at most 1 in sum, not 0\.9 and 0\.1"),
        (["text.hidden_size=10", "text.num_attention_heads=4"], r"text\.hidden_size=10 must be a multiple"),
        (["text.encoder=/no/where"], "No text encoder in /no/where"),
    ],
)
def test_settings_that_do_not_fit_are_refused(text_config, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train_dit(text_config(tmp_path, *settings))
    assert not (tmp_path / "latents").exists(), "refused before the latents are encoded"


@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
@pytest.mark.slow
def test_two_processes_equal_one(text_config, tmp_path, launcher):
    settings = ["train.checkpointing_steps=2", "data.hold_out=true", "train.validation_steps=2", STEADY]
    settings += ["optim.lr_warmup_steps=2"]
    train_dit(text_config(tmp_path / "one", *settings))
    settings += ["train.train_batch_size=2"]
    two, cut = tmp_path / "two", tmp_path / "cut"
    finish(start(text_config(two, *settings), text_config(cut, *settings, "resume=latest"), launcher=launcher))
    assert_near(tmp_path / "one", two)
    assert numbers(two) == numbers(cut)
    assert_same_tensors(two / "final", cut / "final")
