"""The held-out loss of the DiT: what it measures, the same on any number of processes, without touching a training."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from forked import run_forked

from pipelines import default_scheduler
from runs import assert_same_tensors, logged, losses
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.data.splits import list_train_and_validation
from vidgen.losses.config import DiffusionConfig
from vidgen.losses.diffusion import DiffusionLoss
from vidgen.training.config import VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.held_out_loss import held_out_names, measure_held_out_loss
from vidgen.training.vae_trainer import train_vae


class Denoiser(torch.nn.Module):
    """Predicts `scale` times its input, and keeps the timesteps it is given."""

    structure_shape, dynamics_shape = (2, 3), (5,)

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_classes=None, self_conditioning=False, image_residual=0.0)
        self.scale, self.timesteps = scale, []

    def forward(self, noisy, timestep, class_labels, self_condition=None):
        assert class_labels is None
        self.timesteps.append(timestep)
        return SimpleNamespace(sample=self.scale * noisy)


class Cache(list):
    """Latents (11,) of seven clips."""

    def __init__(self) -> None:
        clips = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
        super().__init__({"mean": clip, "label": -1, "index": index} for index, clip in enumerate(clips))


def measure(denoiser: Denoiser, num_clips: int = 7, seed: int = 0, **scheduler) -> dict[str, float]:
    objective = DiffusionLoss(denoiser, default_scheduler(**scheduler), DiffusionConfig())
    return measure_held_out_loss(
        objective,
        Cache(),
        lambda batch: (batch["mean"], batch["label"], batch["noise"], None, None),
        Accelerator(cpu=True),
        noise_size=11,
        num_clips=num_clips,
        num_bins=4,
        seed=seed,
    )


def test_a_denoiser_that_predicts_zero_has_the_error_of_the_targets_in_every_bin():
    denoiser = Denoiser(0.0)
    values = measure(denoiser, prediction_type="sample")
    assert list(values) == held_out_names(["structure", "dynamics"], 4, 1000)
    clips = torch.stack([item["mean"] for item in Cache()]).double()
    expected = {"loss": clips, "structure": clips[:, :6], "dynamics": clips[:, 6:]}
    for name, value in values.items():
        assert value == pytest.approx(expected[name.split("_")[0]].square().mean().item(), rel=1e-6), name
    timesteps = torch.stack(denoiser.timesteps)
    assert timesteps.shape == (7, 4) and len(timesteps.unique()) > 20
    assert (timesteps // 250 == torch.arange(4)).all(), "each bin has a timestep of every clip"


def test_bins_differ_as_the_noise_does_and_a_seed_repeats_them():
    # The input itself is a good estimate of the clean latents where there is little noise.
    values = measure(Denoiser(1.0), prediction_type="sample")
    assert values["structure_t0-250"] < 0.3 < 0.6 < values["structure_t750-1000"]
    assert values["dynamics"] == pytest.approx(
        sum(value for name, value in values.items() if name.startswith("dynamics_")) / 4
    )
    assert measure(Denoiser(1.0), prediction_type="sample") == values
    assert measure(Denoiser(1.0), prediction_type="sample", seed=1) != values
    few = Denoiser(1.0)
    measure(few, num_clips=3, prediction_type="sample")
    assert len(few.timesteps) == 3


def _write(path) -> None:
    torch.manual_seed(torch.initial_seed() % 97)  # whatever the global generator holds
    values = measure(Denoiser(0.7), prediction_type="flow_prediction")
    path.with_name(f"{path.name}-{Accelerator(cpu=True).process_index}").write_text(json.dumps(values))


def test_two_processes_measure_the_same_as_one(tmp_path):
    for processes in (1, 2):
        run_forked(_write, tmp_path / f"{processes}", processes=processes)
    one, *two = ((tmp_path / name).read_text() for name in ("1-0", "2-0", "2-1"))
    assert two == [one, one]


def assert_same_training(a, b, steps: int) -> None:
    """Bit-identical losses, weights and random states."""
    assert losses_of_training(a) == losses_of_training(b)
    for folder in ("final", f"checkpoint-{steps}"):
        assert_same_tensors(a / folder, b / folder)
    states = [run / f"checkpoint-{steps}" / "random_states_0.pkl" for run in (a, b)]
    assert states[0].read_bytes() == states[1].read_bytes()


def losses_of_training(run) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in logged(run) if "loss" in entry}


def test_a_dit_run_is_bit_identical_with_and_without_validation(dit_config, sprites, tmp_path):
    settings = ["train.max_train_steps=4", "model.overrides={self_conditioning: true}", "train.ema_decay=0.9"]
    settings += ["latents.sample=true"]
    train_dit(dit_config(tmp_path / "without", *settings, "train.validation_steps=100"))
    held_out = [f"data.validation_root={sprites}", "train.validation_steps=1", "train.keep_best=structure"]
    held_out += ["validation.num_clips=3", "validation.timestep_bins=2"]
    train_dit(dit_config(tmp_path / "with", *settings, *held_out))
    assert_same_training(tmp_path / "without", tmp_path / "with", 4)
    entries = [entry for entry in logged(tmp_path / "with") if "validation/loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    names = [*held_out_names(["structure", "dynamics"], 2, 1000), "saturation"]
    assert list(entries[0]) == ["step", *(f"validation/{name}" for name in names)]
    best = json.loads((tmp_path / "with" / "best" / "best.json").read_text())
    assert best["value"] == min(entry["validation/structure"] for entry in entries)
    assert not (tmp_path / "without" / "best").exists()


def test_a_vae_run_is_bit_identical_with_and_without_validation(vae_config, sprites, tmp_path):
    settings = ["train.max_train_steps=3", "data.flip=true", "data.num_validation_videos=0"]
    train_vae(vae_config(tmp_path / "without", *settings))
    settings += [f"data.validation_root={sprites}", "train.validation_steps=1", "train.keep_best=validation/psnr"]
    train_vae(vae_config(tmp_path / "with", *settings))
    assert_same_training(tmp_path / "without", tmp_path / "with", 3)
    best = json.loads((tmp_path / "with" / "best" / "best.json").read_text())
    assert best["value"] == max(entry.get("validation/psnr", 0) for entry in logged(tmp_path / "with"))


def test_held_out_videos_are_those_of_the_vae_and_not_trained_on(dit_config, sprites, tmp_path, capsys):
    config = dit_config(tmp_path, "train.max_train_steps=1", "data.hold_out=true")
    train_dit(config)
    assert "14 clips in 8 classes and 2 held-out clips" in capsys.readouterr().out
    vae = load_config(VAETrainingConfig, [f"data.root={sprites}", "data.num_validation_videos=2"])
    train, held_out, _ = list_train_and_validation(vae.data, vae.seed)
    for folder, files in ((tmp_path / "latents", train), (tmp_path / "latents" / "validation", held_out)):
        index = json.loads((folder / "index.json").read_text())
        assert [sprites / path for path, _ in index["videos"]] == [file.path for file in files]
    assert losses(tmp_path).keys() == {1}


def test_keep_best_of_a_dit_without_held_out_videos_is_refused_before_encoding(dit_config, tmp_path):
    with pytest.raises(
        UserError, match=r"^train\.keep_best=loss is not .*no validation metric\. .*data\.hold_out=true"
    ):
        train_dit(dit_config(tmp_path / "none", "train.keep_best=loss"))
    with pytest.raises(UserError, match=r"keep_best=los is not .* are loss, structure, dynamics, structure_t0-200, "):
        train_dit(dit_config(tmp_path / "none", "data.hold_out=true", "train.keep_best=los"))
    assert not (tmp_path / "none" / "latents").exists()
