"""Training VidTwin on clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset

from autoencoder import AutoencoderKLVidTwin, TwinLatents

from ..common.errors import UserError
from ..common.images import component_grid, reenactment_grid
from ..common.io import atomic_dir
from ..data.dataset import ClipDataset, collate_clips, list_train_and_validation
from ..data.decoders import describe_fallbacks
from ..data.latent_cache import encode_clips, split_evenly, statistics_of, stream_sums
from ..losses.adversarial import DiscriminatorLoss, PatchDiscriminator, gan_scale
from ..losses.lpips import LPIPS
from ..losses.vae import VAELoss
from ..metrics.flops import decode_flops, encode_flops
from ..metrics.reconstruction import ReconstructionMetrics, downsample_baseline, mean_color_baseline
from .config import ModelConfig, VAETrainingConfig
from .signals import outlive_first_signal
from .trainer import Trainer, build_accelerator

GRID_CLIPS = 4
STATISTICS_CLIPS = 4096  # at least half as many where there are more: millions of latent values


def train_vae(config: VAETrainingConfig) -> Path:
    """Train as the config says; returns OUTPUT_DIR/final, a VAE folder.

    Raises:
        UserError: if the data, the model or the checkpoint to resume from does not fit.
    """
    accelerator = build_accelerator(config)
    model = build_vae(config.model, config.data.resolution, config.data.num_frames)
    train_set, validation_set = build_datasets(config, model, accelerator.print)
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
    config: VAETrainingConfig, model: AutoencoderKLVidTwin, report: Callable[[str], object] | None = None
) -> tuple[ClipDataset, ClipDataset | None]:
    """Training clips, and the validation clips of their own folder or held out from the same one.

    `report` is called with a summary of each data set.
    """
    data = config.data
    files, validation_files, classes = list_train_and_validation(data, config.seed, report)
    shape = dict(
        num_frames=model.config.num_frames, resolution=model.config.sample_size, fps=data.fps, decoder=data.decoder
    )
    train_set = ClipDataset(
        files,
        classes=classes,
        train=True,
        flip=data.flip,
        seed=config.seed,
        clips_per_video=data.clips_per_video,
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
        self.lpips = self.discriminator = None
        groups = {"model": (list(model.parameters()), 1.0)}
        if config.perceptual.weight:
            perceptual = config.perceptual
            self.lpips = LPIPS.from_pretrained(perceptual.backbone, perceptual.weights, perceptual.weights_sha256)
            self.lpips.to(accelerator.device)
        if config.gan.weight:
            self.discriminator = DiscriminatorLoss(PatchDiscriminator(config.gan), config.gan)
            groups["discriminator"] = (list(self.discriminator.parameters()), config.gan.lr_scale)
        objective = VAELoss(
            model, config.loss, config.perceptual, config.gan, lpips=self.lpips, discriminator=self.discriminator
        )
        super().__init__(
            config, accelerator, objective, model, train_set, collate_clips, model.latent_size, groups=groups
        )
        self.validation_set = validation_set

    def compute_losses(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        scale = gan_scale(self.updates, self.config.gan)
        scale = torch.full((), scale, device=self.accelerator.device) if scale else None
        return self.objective(batch["video"], batch["noise"], scale)

    def idle_groups(self) -> set[str]:
        return set() if gan_scale(self.updates, self.config.gan) else {"discriminator"}

    def after_update(self, terms: dict[str, torch.Tensor], sound: torch.Tensor) -> None:
        if "lecam" in terms:
            logits = self.over_processes(torch.stack([terms["d_real"], terms["d_fake"]]))
            self.discriminator.update_lecam(*logits.where(sound, torch.nan))

    def describe_batch(self, batch: dict[str, Any]) -> list[str]:
        return [str(path) for path in batch["path"]]

    def flops_per_sample(self) -> float:
        return encode_flops(self.model) + decode_flops(self.model)

    def validate(self, model: AutoencoderKLVidTwin) -> dict[str, float]:
        """PSNR, SSIM and LPIPS of held-out clips beside two references, and grids of components and of reenactment."""
        if self.validation_set is None:
            return {}
        metrics = {name: ReconstructionMetrics(self.lpips) for name in ("", "_mean_color", "_downsample")}
        for video in self._validation_clips():
            metrics[""].update(model(video).sample.float(), video)
            metrics["_mean_color"].update(mean_color_baseline(video), video)
            metrics["_downsample"].update(downsample_baseline(video, model.latent_size), video)
        for metric in metrics.values():
            metric.totals = self.accelerator.reduce(metric.totals, reduction="sum")
        if self.accelerator.is_main_process:
            with self.skip_non_finite_pictures():
                self._draw(model)
        computed = {name: metric.compute() for name, metric in metrics.items()}
        return {
            f"{key}{name}": value
            for name, values in computed.items()
            for key, value in values.items()
            if key != "num_clips"
        }

    def _validation_clips(self) -> Iterator[torch.Tensor]:
        """This process's share of the validation clips, in batches."""
        accelerator = self.accelerator
        own = range(accelerator.process_index, len(self.validation_set), accelerator.num_processes)
        loader = DataLoader(
            Subset(self.validation_set, own),
            batch_size=self.config.train.train_batch_size,
            num_workers=self.config.train.dataloader_num_workers,
            collate_fn=collate_clips,
            worker_init_fn=outlive_first_signal,
        )
        for batch in loader:
            self.note_skipped(batch)
            if batch["own"].any():
                yield batch["video"][batch["own"]].to(accelerator.device)

    def _draw(self, model: AutoencoderKLVidTwin) -> None:
        count = len(self.validation_set)
        spread = torch.linspace(0, count - 1, min(GRID_CLIPS, count)).round().long().tolist()
        clips = torch.stack([self.validation_set[i]["video"] for i in spread]).to(self.accelerator.device)
        folder, name = self.output_dir / "validation", f"step-{self.position.step}"
        components = [model(clips, components=c).sample.float() for c in ("both", "structure", "dynamics")]
        component_grid(folder / f"{name}.png", clips, *components)
        latents = model.unpack(model.encode(clips).latent_dist.mode())
        each = [
            TwinLatents(structure[None].expand_as(latents.structure), latents.dynamics)
            for structure in latents.structure
        ]
        crossed = torch.stack([model.decode(crossing).sample.float() for crossing in each])
        reenactment_grid(folder / f"{name}-reenactment.png", clips, clips, crossed)

    def save_final(self, model: AutoencoderKLVidTwin, folder: Path) -> None:
        """The averaged VAE with the statistics of its latents over the training set in its config."""
        mean, std = self._latent_statistics(model)
        model.register_to_config(latents_mean=mean, latents_std=std)
        if self.accelerator.is_main_process:
            with atomic_dir(folder) as aside:
                model.save_pretrained(aside)
                model.model_card(f"{folder.parent.name}").save(aside / "README.md")
            self.accelerator.print(f"{self.bad_videos.count} videos skipped; the trained VAE lies in {folder}.")
        fallbacks = gather_object(list(self.fallbacks))
        if sentence := describe_fallbacks(self.config.data.decoder, fallbacks, len(self.dataset.files)):
            self.accelerator.print(sentence)

    def _latent_statistics(self, model: AutoencoderKLVidTwin) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the latents of training clips, each process encoding its share of them."""
        accelerator, clips = self.accelerator, self.dataset.centered()
        chosen = range(0, len(clips), math.ceil(len(clips) / STATISTICS_CLIPS))
        batches = split_evenly(
            chosen[accelerator.process_index :: accelerator.num_processes], self.config.train.train_batch_size
        )
        workers = self.config.train.dataloader_num_workers
        encoded = encode_clips(model, clips, accelerator.device, batches, workers)
        return statistics_of(gather_object([stream_sums(posterior.mean, model) for posterior, _ in encoded]))
