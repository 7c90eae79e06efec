"""Runs that start from another model: step 0 equals the parent, resume, refused settings, classes, discriminator."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel
from pipelines.latents import normalize_latents
from runs import FULL, assert_same_run, assert_same_tensors, from_parent
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.loading import load_pipeline, load_vae, weights_hash
from vidgen.losses.diffusion import DiffusionLoss
from vidgen.losses.vae import VAELoss
from vidgen.training.checkpoints import list_checkpoints
from vidgen.training.config import VAETrainingConfig
from vidgen.training.dit_trainer import DiTTrainer, train_dit
from vidgen.training.latent_statistics import check_statistics
from vidgen.training.pretrained import Parent, build_transformer_from, read_pipeline
from vidgen.training.trainer import Trainer
from vidgen.training.vae_trainer import VAETrainer, train_vae

GOLDENS = Path(__file__).parents[2] / "data" / "official_golden"
HEADS = "model.overrides={num_attention_heads: 4, qformer_heads: 4, qformer_dropout: 0, bottleneck: plain}"
STEADY = "optim.lr_scheduler=constant_with_warmup"


def captured(monkeypatch: pytest.MonkeyPatch, trainer: type[Trainer]) -> list[tuple[Trainer, dict, dict]]:
    """The trainer, batch and losses of each step."""
    compute, calls = trainer.compute_losses, []

    def compute_and_keep(self, batch):
        result = compute(self, batch)
        calls.append((self, batch, {name: value.detach().clone() for name, value in result.items()}))
        return result

    monkeypatch.setattr(trainer, "compute_losses", compute_and_keep)
    return calls


# --- The VAE ---------------------------------------------------------------------------------------------------------


def start(parent: Path | str, *settings: str) -> list[str]:
    """Settings of a VAE run without dropout that starts from a model."""
    quick = ["model.overrides={qformer_dropout: 0}", "data.num_validation_videos=0"]
    return from_parent(parent, *quick, *settings)


def test_a_vae_run_starts_as_its_parent(vae_config, trained_vae, tmp_path, monkeypatch, capsys):
    calls = captured(monkeypatch, VAETrainer)
    final = train_vae(vae_config(tmp_path / "run", *start(trained_vae, "train.max_train_steps=1", *FULL)))
    trainer, batch, first = calls[0]
    parent = load_vae(str(trained_vae))
    expected = VAELoss(parent, trainer.config.loss)(batch["video"], batch["noise"])
    for name in ("loss", "l1", "kl"):
        assert torch.equal(first[name], expected[name])
    card = (final / "README.md").read_text()
    assert "## Fine-tuned from" in card and f"`{trained_vae}`" in card and weights_hash(parent) in card
    assert load_vae(str(final)).config["_parent"]["sha256"] == weights_hash(parent)


def test_the_average_starts_from_the_parent_also_in_a_pipeline(vae_config, trained_vae, trained_dit, tmp_path):
    final = train_vae(vae_config(tmp_path, *start(trained_dit, "train.max_train_steps=0")))
    assert_same_tensors(final, trained_vae)


@pytest.mark.parametrize("golden", ["mini", "mini_crop", "mini_faint"])
def test_official_checkpoints_train(vae_config, tmp_path, golden, monkeypatch):
    official = GOLDENS / f"{golden}_weights.safetensors"
    if golden == "mini":  # as the authors save it
        torch.save({"state_dict": load_file(official)}, tmp_path / "mini.ckpt")
        official = tmp_path / "mini.ckpt"
    calls = captured(monkeypatch, VAETrainer)
    sizes = ["data.resolution=null", "data.num_frames=null", "data.num_validation_videos=0"]
    settings = from_parent(official, HEADS, *sizes, "train.max_train_steps=1")
    final = train_vae(vae_config(tmp_path / "run", *settings))
    parent = AutoencoderKLVidTwin.from_single_file(official, num_attention_heads=4, qformer_heads=4)
    batch = calls[0][1]
    expected = VAELoss(parent, calls[0][0].config.loss)(batch["video"], batch["noise"])
    assert torch.equal(calls[0][2]["loss"], expected["loss"])
    trained = load_vae(str(final))
    assert weights_hash(trained) != weights_hash(parent)
    assert trained.config.structure_channels == parent.config.structure_channels
    assert f"`{official}`" in (final / "README.md").read_text()


def test_a_resumed_run_needs_no_file_of_its_parent(vae_config, trained_vae, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(trained_vae, parent)
    settings = start(parent, "train.checkpointing_steps=2", "train.freeze=[dynamics_encoder]", STEADY, *FULL)
    train_vae(vae_config(tmp_path / "whole", "train.max_train_steps=4", *settings))
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=3", *settings))
    for folder in (tmp_path / "cut" / "checkpoint-3", tmp_path / "cut" / "final", parent):
        shutil.rmtree(folder)
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=4", "resume=latest", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert (tmp_path / "whole/final/README.md").read_text().replace("whole", "cut") == (
        tmp_path / "cut/final/README.md"
    ).read_text()


def test_resuming_with_another_parent_is_refused(vae_config, trained_vae, tmp_path):
    train_vae(vae_config(tmp_path / "run", *start(trained_vae, "train.max_train_steps=1")))
    shutil.copytree(trained_vae, tmp_path / "same")
    resumed = ["train.max_train_steps=2", "resume=latest"]
    train_vae(vae_config(tmp_path / "run", *start(tmp_path / "same", STEADY, *resumed)))
    with pytest.raises(UserError, match=r"cannot be resumed, because model\.pretrained changed from .* parent w"):
        train_vae(
            vae_config(tmp_path / "run", *start(tmp_path / "run" / "final", *resumed, "train.max_train_steps=3"))
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.preset=tiny-test"], "model.preset=tiny-test is refused; leave one of them out, or set model.preset="),
        (["model.latent_setting=1"], "so model.latent_setting=1 is refused"),
        (["model.overrides={hidden_size: 64}"], r"overrides\.hidden_size=64 would change the shape of the weight"),
        (
            ["model.overrides={temporal_causal: false, num_queries: 2}"],
            r"model\.overrides\.num_queries=2 would change the shape of the weight structure_encoder\.",
        ),
        (["model.overrides={depth: 2}"], r"model\.overrides\.depth is no argument of the model"),
        (["data.resolution=48"], r"^data\.resolution=48 would change the shape of the weight dynamics_d"),
        (["data.resolution=60"], "cannot be built with these overrides: sample_size .60. must be a multiple"),
        (["train.freeze=[encoder, decode]"], "no module 'decode'; its modules are encoder, structure_encoder, "),
        (
            ["train.freeze=[encoder,structure_encoder,dynamics_encoder,structure_decoder,dynamics_decoder,norm_in,"
             "decoder]"],
            "leaves no parameter",
        ),
        (["gan.weight=1", "gan.pretrained=none"], "gan.pretrained=none cannot be read"),
    ],
)  # fmt: skip
def test_a_setting_that_contradicts_the_parent_is_one_sentence(vae_config, trained_vae, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train_vae(vae_config(tmp_path, *start(trained_vae, *settings)))


def test_a_missing_parent_is_one_sentence(vae_config, tmp_path):
    for name in ("nowhere", "nowhere.ckpt"):
        with pytest.raises(UserError, match="nowhere"):
            train_vae(vae_config(tmp_path, *start(tmp_path / name)))


def test_the_default_presets_apply_without_a_parent():
    assert load_config(VAETrainingConfig, ["data.root=x"]).model.preset == "base"
    assert load_config(VAETrainingConfig, ["data.root=x", "model.pretrained=y"]).model.preset is None


# --- The discriminator -----------------------------------------------------------------------------------------------


def test_the_discriminator_starts_from_another_run(vae_config, trained_vae, tmp_path):
    gan = ["gan.start_step=0", *(s for s in FULL if "step" not in s)]
    train_vae(vae_config(tmp_path / "first", *start(trained_vae, "train.max_train_steps=2", *gan)))
    checkpoint = list_checkpoints(tmp_path / "first")[-1]
    saved = load_file(checkpoint / "model.safetensors")
    networks = {k: v for k, v in saved.items() if k.startswith("discriminator.")}
    bare = {k.removeprefix("discriminator.discriminator."): v for k, v in networks.items() if "layers" in k}
    save_file(bare, tmp_path / "patch.safetensors")
    for number, source in enumerate((tmp_path / "first", checkpoint, tmp_path / "patch.safetensors")):
        run = tmp_path / str(number)
        settings = start(trained_vae, "train.max_train_steps=0", f"gan.pretrained={source}", *gan)
        trainer = build_trainer(vae_config(run, *settings))
        for name, tensor in trainer.discriminator.state_dict().items():
            if "lecam" not in name or "patch" not in str(source):
                assert torch.equal(tensor, networks[f"discriminator.{name}"]), name
    for settings, message in (
        (["gan.channels=16", f"gan.pretrained={checkpoint}"], "of another architecture: .* set gan.discriminator"),
        ([f"gan.pretrained={trained_vae}"], "has no discriminator"),
    ):
        with pytest.raises(UserError, match=message):
            build_trainer(vae_config(tmp_path / "wrong", *start(trained_vae, *gan, *settings)))


def build_trainer(config: VAETrainingConfig) -> VAETrainer:
    """The trainer of a run that is not started."""
    trainers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VAETrainer, "fit", lambda self: trainers.append(self))
        train_vae(config)
    return trainers[0]


# --- The DiT ---------------------------------------------------------------------------------------------------------


def test_a_dit_run_starts_as_its_parent_and_inherits_its_target(dit_config, trained_dit, tmp_path, monkeypatch):
    calls = captured(monkeypatch, DiTTrainer)
    final = train_dit(dit_config(tmp_path / "run", *from_parent(trained_dit, "train.max_train_steps=1")))
    trainer, batch, first = calls[0]
    parent = load_pipeline(str(trained_dit))
    objective = DiffusionLoss(parent.transformer, parent.scheduler, trainer.config.diffusion)
    latents = normalize_latents(batch["mean"], parent.vae)
    expected = objective(latents, batch["label"], batch["noise"], batch["uniform"])
    assert torch.equal(first["loss"], expected["loss"])
    tuned = load_pipeline(str(final))
    assert tuned.scheduler.config.prediction_type == trainer.config.diffusion.prediction_type == "v_prediction"
    assert weights_hash(parent.transformer) in (final / "README.md").read_text()
    assert not torch.equal(tuned.transformer.structure_out.weight, parent.transformer.structure_out.weight)


@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention"])
def test_known_classes_keep_their_rows(conditioning):
    torch.manual_seed(0)
    config = {"structure_shape": (4, 3, 2, 2), "dynamics_shape": (8, 4, 4), "num_layers": 1, "num_attention_heads": 2}
    config |= {"attention_head_dim": 8, "class_conditioning": conditioning}
    classes = ["jump", "run", "jump/cat", "jump/dog"]
    original = VidTwinTransformer3DModel(**config, num_classes=4)
    parent = Parent("parent", "hash", {**config, "num_classes": 4}, classes, weights=original.state_dict())
    tuned = build_transformer_from(parent, {}, ["jump", "jump/dog", "jump/owl"])  # a superclass, known and new
    before, after = class_table(original), class_table(tuned)
    assert len(after) == 4
    assert torch.equal(after[[0, 1, 3]], before[[0, 3, 4]])
    assert 0.005 < after[2].std() < 0.04  # as the class initializes it
    others = {name for name in original.state_dict() if "class_embed" not in name}
    assert all(torch.equal(tuned.state_dict()[name], original.state_dict()[name]) for name in others)

    # A parent without classes learns new ones.
    original = VidTwinTransformer3DModel(**config)
    parent = Parent("parent", "hash", {**config, "num_classes": None}, weights=original.state_dict())
    tuned = build_transformer_from(parent, {}, ["jump"])
    assert len(class_table(tuned)) == 2
    assert all(torch.equal(tuned.state_dict()[name], value) for name, value in original.state_dict().items())


def class_table(transformer: VidTwinTransformer3DModel) -> torch.Tensor:
    return (transformer.class_embed or transformer.condition_embed.class_embed).weight.detach()


def test_a_dit_keeps_the_superclasses_of_its_parent(dit_config, sprites, tmp_path):
    """Also those that no clip trains; others than the data's are not in the DiT, as other classes."""
    table = f"data.root={sprites / 'shapes.csv'}"
    settings = [table, "train.max_train_steps=0", "diffusion.subclass_dropout=0.1"]
    parent = train_dit(dit_config(tmp_path / "parent", *settings))
    tuned = train_dit(dit_config(tmp_path / "tuned", *from_parent(parent, table, "train.max_train_steps=0")))
    before, after = load_pipeline(str(parent)), load_pipeline(str(tuned))
    assert after.config.id2label == before.config.id2label
    assert torch.equal(class_table(after.transformer), class_table(before.transformer))

    lines = [line for line in (sprites / "shapes.csv").read_text().splitlines() if "orbit" in line]
    (tmp_path / "orbits.csv").write_text("\n".join(["path,label", *(f"{sprites}/{line}" for line in lines)]))
    settings = from_parent(parent, f"data.root={tmp_path / 'orbits.csv'}", "train.max_train_steps=0")
    orbits = load_pipeline(str(train_dit(dit_config(tmp_path / "orbits", *settings))))
    assert list(orbits.labels) == ["orbit"] and all(name.startswith("orbit/") for name in orbits.subclasses)


def test_data_without_classes_trains_no_class_and_keeps_those_of_the_parent(
    dit_config, trained_dit, sprites, tmp_path, monkeypatch
):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted(sprites.rglob("*.mp4"))[:4]:
        shutil.copy(path, flat / path.name)
    calls = captured(monkeypatch, DiTTrainer)
    settings = from_parent(trained_dit, f"data.root={flat}", "train.max_train_steps=1", "train.train_batch_size=2")
    tuned = load_pipeline(str(train_dit(dit_config(tmp_path / "run", *settings))))
    trainer, batch, _ = calls[0]
    assert trainer.label_ids[batch["label"]].tolist() == [8, 8]
    assert tuned.config.id2label == load_pipeline(str(trained_dit)).config.id2label


def test_a_dit_gains_image_conditioning(dit_config, trained_dit, tmp_path, monkeypatch):
    """The loss of the first step is the parent's."""
    losses = []
    for name, settings in (("plain", []), ("images", ["model.overrides={image_conditioning: true}"])):
        settings = from_parent(trained_dit, *settings, "latents.images=true", "train.max_train_steps=1")
        train_dit(dit_config(tmp_path / name, *settings, "train.logging_steps=1"))
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("has_teacher", [False, True])
def test_a_dit_gains_steps_of_any_length_and_resumes(dit_config, trained_dit, tmp_path, has_teacher):
    """With the moving average and the teacher that they are learned from, which a checkpoint holds."""
    settings = ["model.overrides={interval_conditioning: true}", "diffusion.shortcut=0.75", "train.ema_decay=0.9"]
    settings = from_parent(trained_dit, *settings, "diffusion.shortcut_guidance=2", "train.checkpointing_steps=2")
    settings += ["optim.lr_scheduler=constant_with_warmup", f"diffusion.shortcut_teacher={has_teacher}"]
    settings += ["data.hold_out=true", "train.validation_steps=2"]
    whole = train_dit(dit_config(tmp_path / "whole", *settings, "train.max_train_steps=4"))
    train_dit(dit_config(tmp_path / "cut", *settings, "train.max_train_steps=2"))
    shutil.rmtree(tmp_path / "cut" / "final")
    train_dit(dit_config(tmp_path / "cut", *settings, "train.max_train_steps=4", "resume=latest"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert load_pipeline(str(whole)).transformer.config.interval_conditioning
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    name = "structure_out.weight"
    parent = load_pipeline(str(trained_dit)).transformer.state_dict()[name]
    moved = [(saved[f"{part}.{name}"] - parent).norm() for part in ("average", "transformer")]
    assert 0 < moved[0] < 0.1 * moved[1]
    assert not has_teacher or torch.equal(saved[f"teacher.{name}"], parent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["diffusion.shortcut=0.5"], "set model.overrides.interval_conditioning=true"),
        (["diffusion.prediction_type=epsilon"], "was trained to predict v_prediction; leave it out, or set it to v_"),
        (["model.overrides={self_conditioning: true}"], r"self_conditioning=True would change the shape of the weig"),
        (["model.overrides={num_classes: 3}"], r"model\.overrides\.num_classes sets the classes of the data"),
        (["model.preset=tiny-test"], "model.preset=tiny-test is refused"),
        (["train.freeze=[blocks]"], "no module 'blocks'; its modules are structure_embed, "),
        (["lora.rank=2", "train.freeze=[structure_out]"], "leave train.freeze out"),
        (
            ["lora.rank=2", "lora.target_modules=[to_queries]"],
            "lora.target_modules: The target 'to_queries' matches no",
        ),
        (["model.pretrained=null", "model.preset=tiny-test", "lora.rank=2"], "set model.pretrained=PIPELINE"),
        (["latents.statistics=channel"], r"latents\.statistics=channel would normalize .* latents\.statistics=auto"),
    ],
)
def test_a_setting_that_contradicts_the_pipeline_is_one_sentence(dit_config, trained_dit, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        train_dit(dit_config(tmp_path, *from_parent(trained_dit, "train.max_train_steps=1", *settings)))
    assert not (tmp_path / "latents").exists(), "refused before the latents are encoded"


def test_the_normalization_is_that_of_the_parent(dit_config, trained_dit, trained_vae, tmp_path):
    """Also if the autoencoder of the run states other statistics of its latents."""
    parent = load_pipeline(str(trained_dit))
    assert parent.config.latents_mean is None, "those of its autoencoder"
    vae = load_vae(str(trained_vae))
    vae.set_latent_statistics([0.5, -0.5], [2.0, 3.0])
    vae.save_pretrained(tmp_path / "vae")
    settings = from_parent(trained_dit, f"vae={tmp_path / 'vae'}", "train.max_train_steps=0")
    tuned = load_pipeline(str(train_dit(dit_config(tmp_path / "run", *settings))))
    assert tuned.latent_statistics == parent.latent_statistics

    # A resumed run keeps the statistics of its start, also those that earlier versions measured.
    config = dit_config(tmp_path, *from_parent(trained_dit, "latents.statistics=channel"))
    check_statistics(config, replace(read_pipeline(config.model), weights={}))


def test_latents_of_another_shape_are_one_sentence(dit_config, trained_dit, vae_config, tmp_path):
    settings = ["model.overrides={bottleneck: residual, structure_channels: 2}", "train.max_train_steps=0"]
    other = train_vae(vae_config(tmp_path / "vae", *settings))
    with pytest.raises(UserError, match=r"was trained on structure latents \(4, .*, but those of vae= are \(2, "):
        train_dit(dit_config(tmp_path / "dit", *from_parent(trained_dit, f"vae={other}")))


def test_a_noise_schedule_can_be_replaced(dit_config, trained_dit, tmp_path):
    settings = from_parent(trained_dit, "diffusion.noise_schedule=linear", "train.max_train_steps=0")
    scheduler = load_pipeline(str(train_dit(dit_config(tmp_path, *settings)))).scheduler
    assert (scheduler.config.beta_schedule, scheduler.config.prediction_type) == ("linear", "v_prediction")
    assert scheduler.config.rescale_betas_zero_snr


def test_a_tuned_dit_resumes_bit_for_bit_without_its_parent(dit_config, trained_dit, tmp_path):
    shutil.copytree(trained_dit, tmp_path / "parent")
    settings = from_parent(tmp_path / "parent", "train.checkpointing_steps=2", "optim.name=torch.optim.RAdam", STEADY)
    settings += ["optim.kwargs={weight_decay: 0.01}", "train.freeze=[transformer_blocks.0]"]
    train_dit(dit_config(tmp_path / "whole", "train.max_train_steps=4", *settings))
    train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=2", *settings))
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "parent")
    train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=4", "resume=latest", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    saved = json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer.json").read_text())
    assert saved["parent"]["name"] == str(tmp_path / "parent") and "weights" in saved["parent"]
