"""Resuming with changed settings: a warning that names them, or a refusal; a finished run is left unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from runs import FULL, assert_same_tensors, losses
from vidgen.common.config import load_config, save_config
from vidgen.common.errors import UserError
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.resume import CONFIG, describe_changes, find_changes
from vidgen.training.vae_trainer import train_vae

BF16 = "train.mixed_precision=bf16"
STEADY = "optim.lr_scheduler=constant_with_warmup"


def changes(folder: Path, config_class: type, before: list[str], now: list[str], **facts: tuple) -> str:
    """The changes between a checkpoint with some settings and a run with others, blocking ones marked."""
    required = ["data.root=data", *(["vae=vae"] if config_class is DiTTrainingConfig else [])]
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(exist_ok=True)
    save_config(load_config(config_class, [*required, *before]), checkpoint / CONFIG)
    old, new = ({name.replace("_", " "): pair[i] for name, pair in facts.items()} for i in (0, 1))
    found = find_changes(checkpoint, load_config(config_class, [*required, *now]), old, new)
    return ", ".join(f"{'!' * change.blocking}{change}" for change in found)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([], ["optim.learning_rate=1e-3"], "optim.learning_rate changed from 0.00016 to 0.001"),
        (["gan.weight=0"], ["gan.weight=0.1", "gan.start_step=1"], "!gan.weight changed from 0 to 0.1"),
        (["gan.weight=0.2"], ["gan.weight=0.1"], "gan.weight changed from 0.2 to 0.1"),
        (["gan.weight=0"], ["gan.weight=0", "gan.start_step=1"], ""),
        (["gan.start_step=2"], ["gan.start_step=1"], "gan.start_step changed from 2 to 1"),
        ([], ["perceptual.backbone=alex"], "perceptual.backbone changed from vgg to alex"),
        ([], ["perceptual.weights=moved.pth"], ""),
        ([], ["optim.name=muon"], "!optim.name changed from adamw to muon"),
        ([], ["train.ema_decay=0"], "train.ema_decay changed from 0.999 to 0"),
        (["train.ema_decay=0"], [], "!train.ema_decay changed from 0 to 0.999"),
        ([], ["train.train_batch_size=3"], "train.train_batch_size changed from 6 to 3"),
        ([], ["seed=1", "data.flip=true"], "seed changed from 0 to 1, data.flip changed from False to True"),
        (
            [],
            ["model.overrides={bottleneck: residual}"],
            "model.overrides changed from {} to {'bottleneck': 'residual'}",
        ),
        (["model.overrides={heads: residual}"], ["model.overrides={bottleneck: residual}"], ""),
        ([], ["train.max_train_steps=9000"], "train.max_train_steps changed from 100000 to 9000"),
        ([STEADY], [STEADY, "train.max_train_steps=9000"], ""),
        ([STEADY], [STEADY, "train.max_train_steps=50"], "train.max_train_steps changed from 100000 to 50"),
        ([BF16], ["train.mixed_precision=no"], "train.mixed_precision changed from bf16 to no"),
        ([BF16], ["train.mixed_precision=auto"], ""),
        ([], ["data.root=./data", "output_dir=x", "train.logging_steps=3", "train.dataloader_num_workers=0"], ""),
        ([], ["data.num_validation_videos=2"], "data.num_validation_videos changed from 8 to 2"),
    ],
)
def test_every_setting_that_matters_to_a_vae_run_is_named(tmp_path, before, now, expected):
    assert changes(tmp_path, VAETrainingConfig, before, now) == expected


@pytest.mark.parametrize(
    ("before", "now", "facts", "expected"),
    [
        (
            [],
            ["diffusion.prediction_type=v_prediction"],
            {},
            "!diffusion.prediction_type changed from sample to v_prediction",
        ),
        ([], ["diffusion.guidance_scale=2", "latents.shard_size=3", "data.num_validation_videos=2"], {}, ""),
        ([], ["data.validation_root=x", "validation.num_clips=2", "train.keep_best=loss"], {}, ""),
        (
            ["data.hold_out=true"],
            ["data.hold_out=true", "data.num_validation_videos=2"],
            {},
            "data.num_validation_videos changed from 8 to 2",
        ),
        ([], ["diffusion.class_dropout=0.1"], {}, "diffusion.class_dropout changed from 0.2 to 0.1"),
        ([], ["vae=moved"], {"vae_weights": ("a", "a")}, ""),
        ([], [], {"vae_weights": ("a", "b")}, "!vae weights changed from a to b"),
        ([], [], {"classes": (["run"], ["jump"])}, "!classes changed from ['run'] to ['jump']"),
        ([], [], {"training_clips": (8, 9)}, "training clips changed from 8 to 9"),
        ([], [], {"clips_per_step": (6, 12)}, "clips per step changed from 6 to 12"),
        (
            [],
            ["train.train_batch_size=12"],
            {"clips_per_step": (6, 12)},
            "train.train_batch_size changed from 6 to 12",
        ),
    ],
)
def test_every_setting_that_matters_to_a_dit_run_is_named(tmp_path, before, now, facts, expected):
    assert changes(tmp_path, DiTTrainingConfig, before, now, **facts) == expected


def test_a_checkpoint_without_a_readable_config_has_no_changes_and_a_newer_key_is_none(tmp_path):
    config = load_config(VAETrainingConfig, ["data.root=data", "seed=3"])
    (tmp_path / "checkpoint-1").mkdir()
    assert find_changes(tmp_path / "checkpoint-1", config, {}, {"training clips": 3}) == []
    (tmp_path / CONFIG).write_text("seed: 2\n")  # of the run folder, as older runs have it
    assert describe_changes(find_changes(tmp_path / "checkpoint-1", config, {}, {})) == "seed changed from 2 to 3"
    (tmp_path / "checkpoint-1" / CONFIG).write_text("a: [")
    assert describe_changes(find_changes(tmp_path / "checkpoint-1", config, {}, {})) == "seed changed from 2 to 3"


def test_a_vae_run_with_another_objective_is_refused_and_one_with_another_rate_warned(vae_config, tmp_path, capsys):
    run = tmp_path / "run"
    train_vae(vae_config(run, "train.max_train_steps=1", STEADY))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resumed = ["train.max_train_steps=2", STEADY, "resume=latest"]
    for settings, named in (
        (FULL, r"because gan.weight changed from 0 to 0.05.*Other changes: optim.learning_rate"),
        (["optim.name=muon"], "optim.name changed from adamw to muon"),
        (
            ["model.overrides={bottleneck: residual, hidden_size: 64}"],
            "does not fit this run: .*model.overrides changed",
        ),
    ):
        with pytest.raises(UserError, match=named):
            train_vae(vae_config(run, *resumed, *settings, "optim.learning_rate=2e-3"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    capsys.readouterr()
    train_vae(vae_config(run, *resumed, "train.train_batch_size=2", "loss.kl_weight=0.1"))
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "since checkpoint-1 was written, loss.kl_weight changed from 0.001 to 0.1" in warning
    assert "train.train_batch_size changed from 4 to 2" in warning


def test_a_run_resumed_with_equal_settings_gives_no_warning(vae_config, tmp_path, capsys):
    train_vae(vae_config(tmp_path, "train.max_train_steps=2", STEADY))
    (tmp_path / CONFIG).write_text("seed: 7\n")  # the settings of a checkpoint are its own, not those of the folder
    train_vae(vae_config(tmp_path, "train.max_train_steps=3", STEADY, "resume=latest", "train.logging_steps=2"))
    assert "warning" not in capsys.readouterr().out


def test_a_dit_run_with_another_target_is_refused(dit_config, tmp_path):
    train_dit(dit_config(tmp_path, "train.max_train_steps=1"))
    with pytest.raises(UserError, match="prediction_type changed from sample to epsilon") as error:
        train_dit(
            dit_config(
                tmp_path, "train.max_train_steps=2", "resume=latest", "diffusion.prediction_type=epsilon", "seed=1"
            )
        )
    assert "seed changed from 0 to 1" in str(error.value)


# --- a run that is done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 3])
def test_a_finished_run_is_reported_and_left_unchanged(vae_config, tmp_path, capsys, steps):
    final = train_vae(vae_config(tmp_path, "train.max_train_steps=3"))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train_vae(vae_config(tmp_path, f"train.max_train_steps={steps}", "resume=latest")) == final
    sentence = f"checkpoint-3 has taken 3 steps, and train.max_train_steps is {steps}; {final} is left as it is."
    assert sentence in capsys.readouterr().out
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_killed_before_its_final_model_was_written_writes_it(vae_config, tmp_path, capsys):
    settings = [STEADY, "train.checkpointing_steps=1"]
    run, early = tmp_path / "run", tmp_path / "early"
    shutil.copytree(train_vae(vae_config(run, "train.max_train_steps=2", *settings)), early)
    again = vae_config(run, "train.max_train_steps=3", "resume=latest", *settings)
    final = train_vae(again)
    whole = tmp_path / "whole"
    shutil.copytree(final, whole)
    for left in (None, early):  # none at all, or that of fewer steps
        shutil.rmtree(final)
        if left is not None:
            shutil.copytree(left, final)
        capsys.readouterr()
        assert train_vae(again) == final
        assert f"{final} is written from the checkpoint" in capsys.readouterr().out
        assert_same_tensors(whole, final)
    assert list(losses(run)) == [1, 2, 3]
