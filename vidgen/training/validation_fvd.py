"""Create the Fréchet distances of a training's validations (`vidgen.metrics.validation_fvd`) from its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from autoencoder.video_autoencoder import VideoAutoencoder

from ..data.types import VideoFile
from ..metrics.validation_fvd import ValidationFVD
from .config import DiTTrainingConfig, VAETrainingConfig


def build_validation_fvd(
    config: VAETrainingConfig | DiTTrainingConfig,
    vae: VideoAutoencoder,
    accelerator: Accelerator,
    root: str,
    files: Sequence[VideoFile],
    classes: Sequence[str],
) -> ValidationFVD:
    """Prepare the distances to the real videos `files` of `root`. Raises the errors of `ValidationFVD`."""
    return ValidationFVD(
        config.validation.detectors,
        accelerator,
        Path(config.output_dir) / "features",
        root,
        files,
        classes,
        num_samples=config.validation.num_samples,
        clip_shape=vae.clip_shape,
        fps=config.data.fps,
        seed=config.seed,
        batch_size=config.train.train_batch_size,
        num_workers=config.train.dataloader_num_workers,
    )
