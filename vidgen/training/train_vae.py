"""Training VidTwin on clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from autoencoder import AutoencoderKLVidTwin

from ..config import ModelConfig, VAETrainingConfig
from ..data.dataset import BadVideos, ClipDataset, collate_clips, list_videos, split_validation
from ..errors import UserError
from ..files import written_aside_folder
from ..latent_cache import encode_clips, stream_statistics
from ..metrics.reconstruction import ReconstructionMetrics, mean_colour, shrunk
from ..objectives.vae import VAEObjective
from ..plots import component_grid
from .trainer import Trainer, build_accelerator

GRID_CLIPS = 4


def train_vae(config: VAETrainingConfig) -> Path:
    """Train as the config says; returns OUTPUT_DIR/final, a VAE folder.

    Raises:
        UserError: if the data, the model or the checkpoint to resume from does not fit.
    """
    accelerator = build_accelerator(config)
    model = build_vae(config.model, config.data.resolution, config.data.num_frames)
    train_set, validation_set = build_datasets(config, model, accelerator)
    accelerator.print(
        f"{model.num_parameters():,} parameters; latent {model.latent_size} values, "
        f"{100 * model.compression_rate:.3f} % of a clip; {len(train_set)} training and "
        f"{len(validation_set) if validation_set else 0} validation clips."
    )
    return VAETrainer(config, accelerator, model, train_set, validation_set).fit()


def build_vae(
    config: ModelConfig, resolution: int | None = None, num_frames: int | None = None
) -> AutoencoderKLVidTwin:
    """The model of a recipe, sized for the recipe's clips.

    Raises:
        UserError: if the preset, an override or a size is wrong.
    """
    overrides = dict(config.overrides)
    if resolution is not None:
        overrides["sample_size"] = resolution
    if num_frames is not None:
        overrides["num_frames"] = num_frames
    try:
        return AutoencoderKLVidTwin.from_preset(config.preset, config.latent_setting, **overrides)
    except (ValueError, TypeError) as error:
        raise UserError(f"The model of this recipe cannot be built: {error}") from error


def build_datasets(
    config: VAETrainingConfig, model: AutoencoderKLVidTwin, accelerator: Accelerator
) -> tuple[ClipDataset, ClipDataset | None]:
    """Training clips, and the validation clips of their own folder or held out from the same one."""
    data = config.data
    files, classes = list_videos(data.root)
    if data.validation_root is not None:
        validation_files, _ = list_videos(data.validation_root)
    else:
        files, validation_files = split_validation(
            files, min(data.num_validation_videos, len(files) // 5), config.seed
        )
    shape = dict(num_frames=model.config.num_frames, resolution=model.config.sample_size, fps=data.fps)
    # A folder of fewer videos than a batch has clips is gone through several times an epoch, at new places.
    batch = config.train.train_batch_size * accelerator.num_processes
    clips_per_video = max(data.clips_per_video, math.ceil(batch / len(files)))
    train_set = ClipDataset(
        files,
        classes=classes,
        train=True,
        flip=data.flip,
        seed=config.seed,
        clips_per_video=clips_per_video,
        **shape,
    )
    validation_set = ClipDataset(validation_files, classes=classes, train=False, **shape) if validation_files else None
    return train_set, validation_set


class VAETrainer(Trainer):
    """`Trainer` for `AutoencoderKLVidTwin`."""

    def __init__(
        self,
        config: VAETrainingConfig,
        accelerator: Accelerator,
        model: AutoencoderKLVidTwin,
        train_set: ClipDataset,
        validation_set: ClipDataset | None,
    ) -> None:
        objective = VAEObjective(model, config.loss)
        super().__init__(config, accelerator, objective, model, train_set, collate_clips)
        self.validation_set = validation_set
        self.bad_videos = BadVideos(self.output_dir / "bad_videos.jsonl")

    def compute_losses(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.objective(batch["video"])

    def note_batch(self, batch: dict[str, Any]) -> None:
        self.bad_videos.add(batch["skipped"])

    def describe_batch(self, batch: dict[str, Any]) -> str:
        return ", ".join(map(str, batch["path"]))

    def validate(self) -> dict[str, float]:
        """PSNR and SSIM of held-out clips beside two references, and the grid of components."""
        if self.validation_set is None:
            return {}
        metrics = {name: ReconstructionMetrics() for name in ("", "_mean_colour", "_shrunk")}
        for video in self._loader(self.validation_set):
            reconstruction = self.model(video).sample.float()
            metrics[""].update(reconstruction, video)
            metrics["_mean_colour"].update(mean_colour(video), video)
            metrics["_shrunk"].update(shrunk(video, self.model.latent_size), video)
        spread = torch.linspace(0, len(self.validation_set) - 1, min(GRID_CLIPS, len(self.validation_set)))
        clips = torch.stack([self.validation_set[round(i)]["video"] for i in spread.tolist()])
        clips = clips.to(self.accelerator.device)
        components = [self.model(clips, components=c).sample.float() for c in ("both", "structure", "dynamics")]
        component_grid(self.output_dir / "validation" / f"step-{self.position.step}.png", clips, *components)
        computed = {name: metric.compute() for name, metric in metrics.items()}
        return {f"{key}{name}": values[key] for name, values in computed.items() for key in ("psnr", "ssim")}

    def save_final(self, folder: Path) -> None:
        """The averaged VAE with the statistics of its latents over the training set in its config."""
        encoded = encode_clips(self.model, self.dataset.centred(), self.accelerator.device)
        means = torch.cat([posterior.mean for posterior, _ in encoded])
        mean, std = stream_statistics(means, self.model)
        self.model.register_to_config(latents_mean=mean, latents_std=std)
        with written_aside_folder(folder) as aside:
            self.model.save_pretrained(aside)
        self.accelerator.print(f"{self.bad_videos.count} videos skipped; the trained VAE lies in {folder}.")

    def _loader(self, dataset: ClipDataset) -> Iterator[torch.Tensor]:
        for batch in DataLoader(dataset, batch_size=self.config.train.train_batch_size, collate_fn=collate_clips):
            self.note_batch(batch)
            yield batch["video"].to(self.accelerator.device)
