"""Training the DiT on cached VidTwin latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import SchedulerMixin

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.sampling import normalize_latents

from ..config import DiTTrainingConfig
from ..data.dataset import BadVideos, ClipDataset, list_videos
from ..errors import UserError
from ..files import written_aside_folder
from ..latent_cache import LatentCache, stream_statistics
from ..models import load_vae, weights_hash
from ..objectives.diffusion import DiffusionObjective
from ..plots import class_grid, save_clip_grid_video
from .trainer import Trainer, build_accelerator

SAMPLE_CLASSES = 8


def train_dit(config: DiTTrainingConfig) -> Path:
    """Train as the config says; returns OUTPUT_DIR/final, a pipeline folder.

    Raises:
        UserError: if the VAE, the data, the model or the checkpoint to resume from does not fit.
    """
    accelerator = build_accelerator(config)
    vae = load_vae(config.vae).to(accelerator.device)
    with accelerator.main_process_first():
        cache = prepare_cache(config, vae, accelerator)
    if vae.config.latents_mean is None:  # a converted official VAE comes without statistics
        mean, std = stream_statistics(cache.mean, vae)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    transformer = build_transformer(config, vae, num_classes=len(cache.classes) or None)
    try:
        scheduler = default_scheduler(prediction_type=config.diffusion.prediction_type)
    except ValueError as error:
        raise UserError(f"diffusion.prediction_type does not fit: {error}") from error
    accelerator.print(
        f"{transformer.num_parameters():,} parameters; {sum(transformer.num_tokens)} tokens; "
        f"{len(cache.mean)} clips in {len(cache.classes)} classes."
    )
    return DiTTrainer(config, accelerator, vae, transformer, scheduler, cache).fit()


def build_transformer(
    config: DiTTrainingConfig, vae: AutoencoderKLVidTwin, num_classes: int | None
) -> VidTwinTransformer3DModel:
    """The DiT of a recipe, for the latents of a VAE.

    Raises:
        UserError: if the preset or an override is wrong.
    """
    try:
        return VidTwinTransformer3DModel.from_preset(
            config.model.preset, vae=vae, num_classes=num_classes, **config.model.overrides
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"The DiT of this recipe cannot be built: {error}") from error


def prepare_cache(config: DiTTrainingConfig, vae: AutoencoderKLVidTwin, accelerator: Accelerator) -> LatentCache:
    """The latents of the training clips: from the cache folder where they fit, else encoded and kept there."""
    folder = Path(config.latent_cache or Path(config.output_dir) / "latents")
    files, classes = list_videos(config.data.root)
    source = {
        "vae": weights_hash(vae),
        "data": str(Path(config.data.root).resolve()),
        "videos": len(files),
        "fps": config.data.fps,
    }
    cache = LatentCache.load(folder, source)
    if cache is None:
        shape = dict(num_frames=vae.config.num_frames, resolution=vae.config.sample_size, fps=config.data.fps)
        clips = ClipDataset(files, classes=classes, train=False, **shape)
        with accelerator.autocast():
            bad_videos = BadVideos(Path(config.output_dir) / "bad_videos.jsonl")
            cache = LatentCache.build(vae, clips, source, accelerator.device, bad_videos)
        cache.save(folder)
    return cache


class DiTTrainer(Trainer):
    """`Trainer` for `VidTwinTransformer3DModel`."""

    def __init__(
        self,
        config: DiTTrainingConfig,
        accelerator: Accelerator,
        vae: AutoencoderKLVidTwin,
        transformer: VidTwinTransformer3DModel,
        scheduler: SchedulerMixin,
        cache: LatentCache,
    ) -> None:
        objective = DiffusionObjective(transformer, scheduler, config.diffusion)
        super().__init__(config, accelerator, objective, transformer, cache.dataset())
        self.vae = vae
        self.scheduler = scheduler
        self.classes = cache.classes

    def compute_losses(self, batch: Any) -> dict[str, torch.Tensor]:
        latents, labels = batch
        return self.objective(normalize_latents(latents, self.vae), labels)

    def pipeline(self) -> VidTwinPipeline:
        """The pipeline of the model as it stands."""
        id2label = dict(enumerate(self.classes)) or None
        pipeline = VidTwinPipeline(self.vae, self.model, self.scheduler, id2label=id2label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def validate(self) -> dict[str, float]:
        """Pictures of a clip for each of the first classes, at a fixed seed."""
        diffusion = self.config.diffusion
        classes = self.classes[:SAMPLE_CLASSES]
        frames = self.pipeline()(
            class_labels=list(range(len(classes))) or None,
            guidance_scale=diffusion.guidance_scale,
            num_inference_steps=diffusion.num_inference_steps,
            generator=torch.Generator().manual_seed(self.config.seed),
            output_type="pt",
        ).frames
        clips = 2 * frames.transpose(1, 2) - 1
        folder = self.output_dir / "samples"
        class_grid(folder / f"step-{self.position.step}.png", clips, classes or ["sample"])
        save_clip_grid_video(
            folder / f"step-{self.position.step}.gif", clips, self.config.data.fps, columns=4, labels=classes or None
        )
        return {}

    def save_final(self, folder: Path) -> None:
        """The whole pipeline, with the averaged DiT."""
        with written_aside_folder(folder) as aside:
            self.pipeline().save_pretrained(aside)
        self.accelerator.print(f"The trained pipeline lies in {folder}.")
