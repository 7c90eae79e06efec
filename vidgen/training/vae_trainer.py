"""Training of a video VAE: VidTwin, or another class of `autoencoder.adapters`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.adapters import adapt, build_model
from autoencoder.video_autoencoder import VideoAutoencoder

from ..common.errors import UserError
from ..common.images import comparison_grid, component_grid, reenactment_grid, save_clip_grid_video
from ..data.config import clip_size
from ..data.dataset import ClipDataset, collate_clips
from ..data.decoders import describe_fallbacks
from ..data.latent_encoding import compute_statistics, encode_clips, split_evenly, sum_latents
from ..data.splits import list_train_and_validation
from ..losses import Losses
from ..losses.adversarial import DiscriminatorLoss, PatchDiscriminator, gan_scale
from ..losses.lpips import LPIPS
from ..losses.vae import VAELoss
from ..metrics.flops import decode_flops, encode_flops
from ..metrics.frechet import reduce_sum
from ..metrics.reconstruction import ReconstructionMetrics, downsample_baseline, mean_color_baseline
from ..metrics.validation_fvd import distance_names
from .accelerator import build_accelerator
from .checkpoints import find_checkpoint
from .config import ModelConfig, VAETrainingConfig
from .failures import skip_non_finite_images
from .freezing import describe_parameters, freeze_modules, is_encoder_frozen
from .linear_path import fit_linear_path, has_linear_path, linear_projections
from .pretrained import Parent, build_vae_from, find_parent, load_discriminator
from .signals import outlive_first_signal
from .trainer import Batch, Trainer
from .validation_fvd import build_validation_fvd

GRID_CLIPS = 4
STATISTICS_CLIPS = 4096  # at most this many clips, evenly spaced, for the latent statistics: millions of values


def train_vae(config: VAETrainingConfig) -> Path:
    """Train a VAE; returns OUTPUT_DIR/final, a model folder.

    Raises:
        UserError: if the data, the model or the checkpoint to resume from does not fit.
    """
    accelerator = build_accelerator(config)
    parent = find_parent(config)
    model = build_vae(config.model, *clip_size(config.data), parent)
    frozen = freeze_modules(model.backbone, config.train.freeze)
    train_set, validation_set = build_datasets(config, model, accelerator.print)
    accelerator.print(
        f"{describe_parameters(model)}; latent {model.latent_size} values, "
        f"{100 * model.compression_rate:.3f} % of a clip; {len(train_set)} training and "
        f"{len(validation_set) if validation_set else 0} validation clips."
    )
    if has_linear_path(model) and parent is None and find_checkpoint(config.output_dir, config.resume) is None:
        count, batch_size = config.model.linear_path_clips, config.train.train_batch_size
        fit_linear_path(model, train_set, count, batch_size, config.train.dataloader_num_workers)
    return VAETrainer(config, accelerator, model, train_set, validation_set, parent, frozen).fit()


def build_vae(
    config: ModelConfig,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    parent: Parent | None = None,
) -> VideoAutoencoder:
    """Create the VAE of a config for clips of the given size, with the weights of a parent if there is one.

    Raises:
        UserError: if the preset, an override or a size is wrong.
    """
    sample_size = height if height == width else [height, width]
    sizes = {"sample_size": sample_size, "num_frames": num_frames}
    class_name = config.class_name if parent is None else parent.class_name
    is_vidtwin = class_name == AutoencoderKLVidTwin.__name__
    overrides = config.overrides | {name: x for name, x in sizes.items() if is_vidtwin and x is not None}
    try:
        if parent is not None or not is_vidtwin:
            model = build_model(class_name, **overrides) if parent is None else build_vae_from(parent, overrides)
            return adapt(model, **({} if is_vidtwin else dict(num_frames=num_frames, height=height, width=width)))
        return AutoencoderKLVidTwin.from_preset(config.preset, config.latent_setting, **overrides)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"The model of this config cannot be built: {error}") from error


def build_datasets(
    config: VAETrainingConfig, model: VideoAutoencoder, report: Callable[[str], object] | None = None
) -> tuple[ClipDataset, ClipDataset | None]:
    """Create the training clips and the validation clips, of their own folder or held out from the training videos.

    `report` is called with a summary of each dataset.
    """
    data = config.data
    files, validation_files, classes = list_train_and_validation(data, config.seed, report)
    _, num_frames, *resolution = model.clip_shape
    shape = dict(num_frames=num_frames, resolution=resolution, fps=data.fps, decoder=data.decoder)
    train_set = ClipDataset(
        files,
        classes=classes,
        train=True,
        flip=data.flip,
        zoom=data.zoom,
        speed=data.speed,
        color=data.color,
        background_swap=data.background_swap,
        motion_classes=data.motion_classes,
        seed=config.seed,
        clips_per_video=data.clips_per_video,
        **shape,
    )
    validation_set = ClipDataset(validation_files, classes=classes, train=False, **shape) if validation_files else None
    return train_set, validation_set


class VAETrainer(Trainer):
    """`Trainer` of a `VideoAutoencoder`."""

    def __init__(
        self,
        config: VAETrainingConfig,
        accelerator: Accelerator,
        model: VideoAutoencoder,
        train_set: ClipDataset,
        validation_set: ClipDataset | None,
        parent: Parent | None = None,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        self.lpips = self.discriminator = None
        self.validation_set = validation_set
        self.fvd = None
        if config.validation.detectors:
            if validation_set is None:
                raise UserError(
                    "validation.detectors needs validation videos: set data.validation_root or "
                    "data.num_validation_videos."
                )
            root = config.data.validation_root or config.data.root
            videos = validation_set.files, validation_set.classes
            self.fvd = build_validation_fvd(config, model, accelerator, root, *videos)
        linear = linear_projections(model)
        linear_ids = set(map(id, linear))
        groups = {"model": ([p for p in model.parameters() if p.requires_grad and id(p) not in linear_ids], 1.0)}
        if trained := [p for p in linear if p.requires_grad]:
            groups["linear_path"] = (trained, config.optim.linear_path_lr_scale)
        if config.perceptual.weight:
            perceptual = config.perceptual
            self.lpips = LPIPS.from_pretrained(perceptual.backbone, perceptual.weights, perceptual.weights_sha256)
            self.lpips.to(accelerator.device)
        if config.gan.weight:
            self.discriminator = DiscriminatorLoss(PatchDiscriminator(config.gan), config.gan)
            if config.gan.pretrained and find_checkpoint(config.output_dir, config.resume) is None:
                load_discriminator(self.discriminator, config.gan.pretrained)
            groups["discriminator"] = (list(self.discriminator.parameters()), config.gan.lr_scale)
        objective = VAELoss(
            model, config.loss, config.perceptual, config.gan, lpips=self.lpips, discriminator=self.discriminator
        )
        super().__init__(
            config,
            accelerator,
            objective,
            model,
            train_set,
            collate_clips,
            model.latent_size,
            groups=groups,
            parent=parent,
            frozen=frozen,
        )

    def compute_losses(self, batch: Batch) -> Losses:
        scale = gan_scale(self.updates, self.config.gan)
        scale = torch.full((), scale, device=self.accelerator.device) if scale else None
        return self.objective(batch["video"], batch["noise"], scale, batch["uniform"])

    def frozen_groups(self) -> set[str]:
        return set() if gan_scale(self.updates, self.config.gan) else {"discriminator"}

    def on_optimizer_step(self, terms: Losses, is_finite: torch.Tensor) -> None:
        if "lecam" in terms:
            logits = self.mean_over_processes(torch.stack([terms["d_real"], terms["d_fake"]]))
            self.discriminator.update_lecam(*logits.where(is_finite, torch.nan))

    def describe_batch(self, batch: Batch) -> list[str]:
        return [str(path) for path in batch["path"]]

    def flops_per_sample(self) -> float:
        return encode_flops(self.model) + decode_flops(self.model)

    def validation_metrics(self, config: VAETrainingConfig) -> list[str]:
        if not self.validation_set:
            return []
        return [*ReconstructionMetrics(self.lpips).names, *distance_names(config.validation.detectors, "rfvd")]

    def validate(self, model: VideoAutoencoder) -> dict[str, float]:
        """PSNR, SSIM and LPIPS of the model and two baselines on validation clips, rFVD; components and swaps."""
        if self.validation_set is None:
            return {}
        metrics = {name: ReconstructionMetrics(self.lpips) for name in ("", "_mean_color", "_downsample")}
        for video in self._validation_clips():
            metrics[""].update(model(video).sample.float(), video)
            metrics["_mean_color"].update(mean_color_baseline(video), video)
            metrics["_downsample"].update(downsample_baseline(video, model.latent_size), video)
        for metric in metrics.values():
            metric.totals = reduce_sum(metric.totals)
        if self.accelerator.is_main_process:
            with skip_non_finite_images(self.state.step, self.accelerator.print):
                self._draw_grids(model)
        values = {
            f"{key}{name}": value
            for name, metric in metrics.items()
            for key, value in metric.compute().items()
            if key != "num_clips"
        }
        return values | (self.fvd.measure_reconstruction(model, self.state.step) if self.fvd else {})

    def _validation_clips(self) -> Iterator[torch.Tensor]:
        """This process's share of the validation clips, in batches (B, 3, T, H, W)."""
        accelerator = self.accelerator
        indices = range(accelerator.process_index, len(self.validation_set), accelerator.num_processes)
        loader = DataLoader(
            Subset(self.validation_set, indices),
            batch_size=self.config.train.train_batch_size,
            num_workers=self.config.train.dataloader_num_workers,
            collate_fn=collate_clips,
            worker_init_fn=outlive_first_signal,
        )
        for batch in loader:
            self.video_failures.collect(batch)
            if batch["own"].any():
                yield batch["video"][batch["own"]].to(accelerator.device)

    def _draw_grids(self, model: VideoAutoencoder) -> None:
        count = len(self.validation_set)
        indices = torch.linspace(0, count - 1, min(GRID_CLIPS, count)).round().long().tolist()
        clips = torch.stack([self.validation_set[i]["video"] for i in indices]).to(self.accelerator.device)
        folder, name = self.output_dir / "validation", f"step-{self.state.step}"
        if not model.has_dynamics:
            reconstruction = model(clips).sample.float()
            grid = comparison_grid(folder / f"{name}.png", {"original": clips, "reconstruction": reconstruction})
            self.log_media({"reconstruction": grid} | self._draw_video(folder / f"{name}.gif", clips, reconstruction))
            return
        components = [model(clips, components=c).sample.float() for c in ("both", "structure", "dynamics")]
        grid = component_grid(folder / f"{name}.png", clips, *components)
        self.log_media({"reconstruction": grid} | self._draw_video(folder / f"{name}.gif", clips, components[0]))
        latents = model.unpack(model.encode(clips).latent_dist.mode())
        swaps = [
            TwinLatents(structure[None].expand_as(latents.structure), latents.dynamics)
            for structure in latents.structure
        ]
        decoded = torch.stack([model.decode(swap).sample.float() for swap in swaps])
        grid = reenactment_grid(folder / f"{name}-reenactment.png", clips, clips, decoded)
        self.log_media({"reenactment": grid})

    def _draw_video(self, path: Path, clips: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, Path]:
        """Write a video of clips beside their reconstructions; returns its file by name."""
        pairs = torch.stack([clips, reconstructions], dim=1).flatten(0, 1)
        labels = ["original", "reconstruction"] * len(clips)
        video = save_clip_grid_video(path, pairs, self.config.data.fps, columns=4, labels=labels)
        return {"reconstruction_video": video}

    def finish_model(self, model: VideoAutoencoder) -> None:
        """Set the statistics of the latents over the training set in the VAE's config.

        With a frozen encoder the parent's statistics stay valid, also for the DiTs trained with them.
        """
        if model.latents_mean is None or not is_encoder_frozen(self.model):
            model.set_latent_statistics(*self._latent_statistics(model))

    def write_model(self, model: VideoAutoencoder, folder: Path, destination: Path) -> None:
        model.save_pretrained(folder)
        model.model_card(destination.parent.name).save(folder / "README.md")

    def report_final(self, folder: Path) -> None:
        skipped = self.video_failures.bad_videos.count
        self.accelerator.print(f"{skipped} videos skipped; the trained VAE is saved in {folder}.")
        fallbacks = gather_object(list(self.video_failures.fallbacks))
        if sentence := describe_fallbacks(self.config.data.decoder, fallbacks, len(self.dataset.files)):
            self.accelerator.print(sentence)

    def _latent_statistics(self, model: VideoAutoencoder) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the latents of the training clips, encoded by all processes together."""
        accelerator, clips = self.accelerator, self.dataset.centered()
        indices = range(0, len(clips), math.ceil(len(clips) / STATISTICS_CLIPS))
        indices = indices[accelerator.process_index :: accelerator.num_processes]
        batches = split_evenly(indices, self.config.train.train_batch_size)
        workers = self.config.train.dataloader_num_workers
        encoded = encode_clips(model, clips, accelerator.device, batches, workers)
        sums = [sum_latents(posterior.mean[batch["own"]], model) for posterior, batch in encoded]
        return compute_statistics(gather_object(sums))
