"""The linear path in training: fitted before the first step, trained slowly, resumed."""

from __future__ import annotations

import shutil

import torch

from autoencoder import AutoencoderKLVidTwin
from runs import assert_same_run, numbers
from vidgen.data.dataset import ClipDataset
from vidgen.training import vae_trainer
from vidgen.training.linear_path import choose_clip, fit_linear_path, linear_projections
from vidgen.training.vae_trainer import train_vae

PATH = ["model.overrides={bottleneck: residual, linear_path: 2}", "model.linear_path_clips=20", "loss.l2_weight=1"]
STEADY = "optim.lr_scheduler=constant_with_warmup"  # the schedule of a run of another length


def test_a_run_starts_from_the_fit_and_resumes(vae_config, tmp_path, monkeypatch):
    fits = []
    original = vae_trainer.fit_linear_path
    monkeypatch.setattr(vae_trainer, "fit_linear_path", lambda *a: fits.append(a) or original(*a))
    settings = ["train.checkpointing_steps=2", STEADY, *PATH]
    train_vae(vae_config(tmp_path / "whole", "train.max_train_steps=4", *settings))
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=3", *settings))
    for name in ("final", "checkpoint-3"):
        shutil.rmtree(tmp_path / "cut" / name)
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=4", "resume=latest", *settings))
    assert len(fits) == 2
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    train_vae(vae_config(tmp_path / "without", "train.max_train_steps=2", "loss.l2_weight=1"))
    with_path, without = (numbers(tmp_path / name) for name in ("whole", "without"))
    assert with_path[1]["l2"] < 0.5 * without[1]["l2"]
    assert with_path[4]["validation/psnr"] > without[2]["validation/psnr"] + 3


def test_the_fit_is_that_of_the_chosen_clips(sprites):
    clips = ClipDataset(sprites, num_frames=4, fps=4, resolution=32, seed=3)
    torch.manual_seed(0)
    model, expected = (AutoencoderKLVidTwin.from_preset("tiny-test", linear_path=2) for _ in range(2))
    drawn = torch.get_rng_state()
    fit_linear_path(model, clips, count=20, batch_size=8)
    assert torch.equal(torch.get_rng_state(), drawn)
    chosen = [(0, i) for i in range(16)] + [(1, i) for i in range(4)]
    assert [choose_clip(n, 20, len(clips)) for n in range(20)] == chosen
    expected.fit_linear_path(torch.stack([clips[at]["video"] for at in chosen]).split(8))
    assert all(torch.equal(a, b) for a, b in zip(linear_projections(model), linear_projections(expected), strict=True))


def test_fewer_clips_than_videos_are_evenly_spaced():
    assert [choose_clip(n, 3, 10) for n in range(3)] == [(0, 0), (0, 3), (0, 6)]


def test_projections_have_a_lower_learning_rate(vae_config, tmp_path):
    def train(scale: float) -> dict[str, torch.Tensor]:
        settings = [*PATH, f"optim.linear_path_lr_scale={scale}", "optim.name=muon", "train.max_train_steps=1"]
        run = train_vae(vae_config(tmp_path / str(scale), *settings, "train.ema_decay=0", "optim.lr_warmup_steps=0"))
        return AutoencoderKLVidTwin.from_pretrained(run).state_dict()

    fixed, trained = train(0.0), train(0.01)
    changes = {key: (trained[key] - fixed[key]).abs().max().item() for key in fixed}
    projections = {key for key in changes if "linear_" in key and not key.endswith("logvar")}
    assert all(5e-6 < changes[key] < 2e-5 for key in projections)
    assert all(changes[key] < 1e-6 for key in changes.keys() - projections)
