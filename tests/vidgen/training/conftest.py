"""Runs of the real trainings on a handful of sprites."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vidgen.common.config import load_config
from vidgen.data.sprites import write_sprites
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig

TINY = [
    "perceptual.weight=0",
    "gan.weight=0",
    "model.preset=tiny-test",
    "model.overrides={bottleneck: residual}",
    "data.resolution=32",
    "data.num_frames=4",
    "data.fps=4",
    "data.num_validation_videos=2",
    "train.train_batch_size=4",
    "train.mixed_precision=no",
    "train.dataloader_num_workers=0",
    "train.report_to=none",
    "train.logging_steps=1",
    "optim.lr_warmup_steps=2",
    "optim.learning_rate=1e-3",
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sprites(tmp_path_factory) -> Path:
    """Two clips of each class; read only."""
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 2, seed=0, resolution=32)
    return root


@pytest.fixture(scope="session")
def vae_config(sprites):
    """A tiny VAE run's config, with overrides."""

    def make(output_dir: Path, *overrides: str) -> VAETrainingConfig:
        return load_config(VAETrainingConfig, [*TINY, f"data.root={sprites}", f"output_dir={output_dir}", *overrides])

    return make


@pytest.fixture(scope="session")
def trained_vae(vae_config, tmp_path_factory) -> Path:
    """The final folder of a short VAE run."""
    from vidgen.training.vae_trainer import train_vae

    return train_vae(vae_config(tmp_path_factory.mktemp("vae"), "train.max_train_steps=6"))


@pytest.fixture(scope="session")
def dit_config(sprites, trained_vae):
    """A tiny DiT run's config, with overrides."""

    def make(output_dir: Path, *overrides: str) -> DiTTrainingConfig:
        of_the_vae = ("perceptual", "gan", "model", "data.resolution", "data.num_frames")
        shared = [x for x in TINY if not x.startswith(of_the_vae)]
        settings = ["model.preset=tiny-test", f"vae={trained_vae}", f"data.root={sprites}", f"output_dir={output_dir}"]
        settings += ["diffusion.num_inference_steps=3"]
        return load_config(DiTTrainingConfig, [*shared, *settings, *overrides])

    return make


@pytest.fixture(scope="session")
def trained_dit(dit_config, tmp_path_factory) -> Path:
    """The pipeline of a short, class-conditional run that predicts v."""
    from vidgen.training.dit_trainer import train_dit

    settings = ["train.max_train_steps=3", "diffusion.prediction_type=v_prediction"]
    return train_dit(dit_config(tmp_path_factory.mktemp("dit"), *settings))
