"""Training of the DiT on cached VidTwin latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, init_empty_weights
from diffusers import SchedulerMixin
from torch import nn
from torch.utils.data import default_collate

from autoencoder import TwinPosterior
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.classes import superclass_names
from pipelines.latents import normalize_latents
from pipelines.schedulers import prediction_type_of
from pipelines.text import TextEncoder

from ..common.environment import set_cpu_threads
from ..common.errors import UserError
from ..common.images import class_grid, save_clip_grid_video
from ..common.loading import encoder_hash, load_vae, weights_hash
from ..common.precision import agree_on_mixed_precision
from ..data.caption_cache import OWN_ENCODERS, SMALL, warn_of_cut
from ..data.config import clip_size
from ..data.dataset import BadVideos
from ..data.latent_cache import LatentCache, prepare_cache, prepare_validation_cache
from ..data.splits import list_videos_to_encode
from ..losses import Losses
from ..losses.config import DiffusionConfig
from ..losses.diffusion import DiffusionLoss, check_diffusion
from ..losses.frame_timesteps import check_frame_timesteps
from ..losses.self_alignment import choose_layers
from ..losses.shortcut import check_shortcut
from ..metrics.flops import transformer_flops
from ..metrics.fvd import Sampling
from ..metrics.validation_fvd import ValidationFVD, distance_names
from .accelerator import build_accelerator
from .best_model import check_keep_best
from .config import DiTTrainingConfig
from .failures import skip_non_finite_images
from .freezing import describe_parameters, freeze_modules
from .held_out_loss import Prepared, held_out_names, measure_held_out_loss
from .latent_statistics import Statistics, check_statistics, choose_statistics
from .lora import add_lora, check_lora, write_lora
from .optimizers import check_optimizer
from .pretrained import (
    Parent,
    build_transformer_from,
    check_latent_shapes,
    find_parent,
    parent_scheduler,
    transformer_arguments,
)
from .random_state import keep_random_state
from .saturation import describe_saturation, measure_saturation
from .text import (
    caption_channels,
    check_parent,
    check_text,
    describe_text,
    load_encoder,
    load_frozen_encoder,
    prepare_own_encoder,
)
from .trainer import Batch, Trainer
from .validation_fvd import build_validation_fvd

SAMPLE_CLASSES = 8
LABEL_CHARACTERS = 48  # of a prompt beside its sample
DiT = VidTwinTransformer3DModel | nn.ModuleDict  # with a text encoder that is trained with it: a ModuleDict of both


def train_dit(config: DiTTrainingConfig) -> Path:
    """Train a DiT; returns OUTPUT_DIR/final, a pipeline folder.

    Raises:
        UserError: if the VAE, the data, the model or the checkpoint to resume from does not fit.
    """
    # Check the config before the latents are encoded, which may take hours.
    accelerator = build_accelerator(config)
    check_diffusion(config.diffusion)
    check_optimizer(config.optim, config.train.max_train_steps)
    check_text(config)
    if config.lora.rank:
        check_lora(config, accelerator.distributed_type)
    files, held_out, names = list_videos_to_encode(config.data, config.seed)
    parent = find_parent(config)
    superclasses = find_superclasses(config, names, parent)
    check_statistics(config, parent)
    scheduler = build_scheduler(config.diffusion, parent)
    arguments = transformer_arguments(config.model, parent)
    if config.diffusion.shortcut:
        check_shortcut(prediction_type_of(scheduler), arguments.get("interval_conditioning", False))
    if config.diffusion.self_alignment:
        choose_layers(config.diffusion.self_alignment_layers, arguments["num_layers"])
    vae = load_vae(config.vae, *clip_size(config.data)).to(accelerator.device)
    if config.diffusion.frame_timesteps:
        patch_frames, _ = arguments.get("dynamics_patch_size", (1, 1))
        check_frame_timesteps(vae.dynamics_shape[1] // patch_frames, math.prod(vae.dynamics_shape))
    text_encoder = load_encoder(config, parent, accelerator.device)
    if config.model.latent_setting is not None:
        raise UserError(
            f"model.latent_setting is a setting of the VAE; the DiT uses the latents of {config.vae} unchanged. "
            "Leave it out."
        )
    check_validation(config, vae, scheduler, bool(held_out))
    fvd = None
    if config.validation.detectors:
        fvd = build_validation_fvd(config, vae, accelerator, config.data.root, files, names)

    classes = choose_classes(config, superclasses, names, parent)
    if parent is not None:
        check_latent_shapes(parent, config.model.overrides, vae)
        if parent.encoder not in (None, encoder_hash(vae)):
            accelerator.print(
                f"warning: the latents of {config.vae} are not those of the VAE that {parent.name} was trained with."
            )
        if config.text.encoder is not None and (warning := check_parent(config, parent, text_encoder)):
            accelerator.print(f"warning: {warning}")

    # Build the DiT once without memory and without random numbers, which raises all errors of its settings.
    num_channels = caption_channels(config.text, text_encoder)
    with keep_random_state(accelerator.device), init_empty_weights():
        build_dit(config, vae, classes, num_channels, parent and replace(parent, weights={}))

    # Encode the clips, or find them in the cache.
    workers = config.train.dataloader_num_workers
    cache = prepare_cache(config, vae, accelerator, workers, text_encoder)
    validation_cache = prepare_validation_cache(config, vae, accelerator, workers, text_encoder)
    if accelerator.is_main_process:  # before the trainer reads the file
        bad_videos = [*cache.bad_videos, *(validation_cache.bad_videos if validation_cache else [])]
        BadVideos(Path(config.output_dir) / "bad_videos.jsonl").add(bad_videos)

    # Create the text encoder of the run, and tokenize the captions for it.
    if config.text.encoder in OWN_ENCODERS:
        text_encoder = prepare_own_encoder(config, text_encoder, cache, accelerator)
        tokenizer = text_encoder.tokenizer
        for part in filter(None, (cache, validation_cache)):
            if num_cut := part.captions.tokenize(tokenizer, config.text.max_length):
                accelerator.print(warn_of_cut(num_cut, len(part.captions.texts) - 1, config.text, tokenizer))

    # Train.
    statistics = choose_statistics(config, vae, cache, parent)
    transformer, frozen = build_dit(config, vae, classes, num_channels, parent)
    described = f"in {len(cache.classes)} classes" if cache.classes else "without classes"
    if cache.captions is not None:
        described += f" with {len(cache.captions.texts) - 1} different captions"
    accelerator.print(
        f"{describe_parameters(transformer)}; {sum(transformer.num_tokens)} tokens; {len(cache)} clips {described}"
        f"{f' and {len(validation_cache)} held-out clips' if validation_cache else ''}"
        f"{'' if classes or text_encoder else ', so the DiT is unconditional'}."
    )
    return DiTTrainer(
        config,
        accelerator,
        vae,
        transformer,
        scheduler,
        cache,
        validation_cache,
        statistics,
        classes,
        parent,
        frozen,
        fvd,
        text_encoder,
    ).fit()


def encode_latents(config: DiTTrainingConfig) -> Path:
    """Fill the latent cache of a config on all processes, without training; returns its folder.

    Raises:
        UserError: if the VAE or the data does not fit.
    """
    set_cpu_threads()
    try:
        accelerator = Accelerator(mixed_precision=agree_on_mixed_precision(config.train.mixed_precision).precision)
    except ValueError as error:
        raise UserError(f"train.mixed_precision does not fit: {error}") from error
    vae = load_vae(config.vae, *clip_size(config.data)).to(accelerator.device)
    text_encoder = load_frozen_encoder(config.text, accelerator.device)
    cache = prepare_cache(config, vae, accelerator, config.train.dataloader_num_workers, text_encoder)
    prepare_validation_cache(config, vae, accelerator, config.train.dataloader_num_workers, text_encoder)
    folder = Path(cache.folder)
    accelerator.print(
        f"{len(cache)} clips in {len(cache.classes)} classes; {len(cache.bad_videos)} videos skipped; latent cache: "
        f"{folder}."
    )
    return folder


def check_validation(
    config: DiTTrainingConfig, vae: VideoAutoencoder, scheduler: SchedulerMixin, has_held_out: bool
) -> None:
    """Raise a `UserError` if `train.keep_best` is no metric of the run, before the latents are encoded."""
    if config.train.keep_best is not None:
        known = list_validation_metrics(config, vae, scheduler, has_held_out)
        hint = "" if has_held_out else "Held-out videos are needed: set data.hold_out=true or data.validation_root."
        check_keep_best(config.train.keep_best, known, hint)


def list_validation_metrics(
    config: DiTTrainingConfig, vae: VideoAutoencoder, scheduler: SchedulerMixin, has_held_out: bool
) -> list[str]:
    """Names of the values that a validation measures, with held-out clips or without."""
    distances = distance_names(config.validation.detectors, "fvd")
    if not has_held_out:
        return distances
    shapes = {"structure": vae.structure_shape, "dynamics": vae.dynamics_shape}
    streams = [name for name, shape in shapes.items() if math.prod(shape)]
    steps = scheduler.config.num_train_timesteps
    return [*held_out_names(streams, config.validation.timestep_bins, steps), *distances]


def find_superclasses(config: DiTTrainingConfig, classes: Sequence[str], parent: Parent | None) -> list[str]:
    """Superclasses of the dataset's classes that the DiT has too; their ids come before those of the classes.

    With `subclass_dropout` they are all superclasses, without it those that the parent knows.

    Raises:
        UserError: if the config has `subclass_dropout` but the dataset has no subclasses.
    """
    superclasses = superclass_names(classes)
    if not config.diffusion.subclass_dropout:
        known = parent.classes if parent is not None else ()
        superclasses = [name for name in superclasses if name in known]
    elif not superclasses:
        raise UserError(
            "diffusion.subclass_dropout needs classes with subclasses, such as jump/dog of jump: name them in a CSV "
            f"file (path,label); the classes of this dataset are {', '.join(classes[:4]) or 'none'}."
        )
    return [name for name in superclasses if name not in classes]


def choose_classes(
    config: DiTTrainingConfig, superclasses: Sequence[str], classes: Sequence[str], parent: Parent | None
) -> list[str]:
    """Names of the DiT's classes by id: those of the data, after their superclasses.

    They are the parent's if the data has none, and always with LoRA, which does not change the class table.

    Raises:
        UserError: if LoRA meets a class that the parent does not know.
    """
    own = [*superclasses, *classes]
    if parent is None or (own and not config.lora.rank):
        return own
    unknown = [name for name in own if name not in parent.classes]
    if parent.classes and unknown:
        raise UserError(
            f"lora.rank trains no class table, and {parent.name} does not know the class {unknown[0]!r}; rename it to "
            "a class of the parent, remove the labels of the data, or train without LoRA."
        )
    return list(parent.classes)


def build_dit(
    config: DiTTrainingConfig,
    vae: VideoAutoencoder,
    classes: Sequence[str],
    num_channels: int | None,
    parent: Parent | None,
) -> tuple[VidTwinTransformer3DModel, list[nn.Module]]:
    """Create the DiT of a run, with an adapter of LoRA; returns it and its frozen modules.

    Args:
        config: of the run.
        vae: that gives the latents.
        classes: their names by id.
        num_channels: of a token embedding; None without captions.
        parent: of the run.

    Raises:
        UserError: if the config does not fit the model.
    """
    overrides = config.model.overrides
    if num_channels is not None:
        overrides = {**overrides, "caption_channels": num_channels}
    if parent is None:
        transformer = build_transformer(config, vae, len(classes) or None, overrides)
    else:
        transformer = build_transformer_from(parent, overrides, classes)
    for name in ("independent_timesteps", "frame_timesteps"):
        if (is_trained := getattr(config.diffusion, name) > 0) or parent is None:
            transformer.register_to_config(**{name: is_trained})
    if transformer.config.caption_channels and num_channels is None:
        raise UserError("A DiT with caption_channels is trained on captions: set text.encoder.")
    if transformer.config.image_conditioning and not config.latents.images:
        raise UserError("A DiT with image_conditioning is trained on the first frames too: set latents.images=true.")
    if config.latents.image_swap and not transformer.config.image_residual:
        raise UserError(
            "latents.image_swap shows a clip the first frame of another, which only the difference of a clip from its "
            "first frame is independent of: set model.overrides.image_residual above 0, or leave it out."
        )
    if config.lora.rank:
        add_lora(transformer, config.lora)
        return transformer, []
    return transformer, freeze_modules(transformer, config.train.freeze)


def build_transformer(
    config: DiTTrainingConfig,
    vae: VideoAutoencoder,
    num_classes: int | None,
    overrides: Mapping[str, Any] | None = None,
) -> VidTwinTransformer3DModel:
    """Create the DiT of a config for the latents of a VAE; `overrides` replace those of the config.

    Raises:
        UserError: if the preset or an override is wrong.
    """
    overrides = config.model.overrides if overrides is None else overrides
    try:
        return VidTwinTransformer3DModel.from_preset(
            config.model.preset, vae=vae, num_classes=num_classes, **overrides
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"The DiT of this config cannot be built: {error}") from error


def build_scheduler(config: DiffusionConfig, parent: Parent | None = None) -> SchedulerMixin:
    """Create the scheduler of a config, with which the trained pipeline samples.

    With a parent it is the parent's, in which the noise schedule can be replaced. The prediction type is then set in
    `config`, which is saved with the run.

    Raises:
        UserError: if a name is unknown, the settings exclude each other, or the parent predicts something else.
    """
    if parent is not None:
        predicted = prediction_type_of(parent_scheduler(parent))
        if config.prediction_type not in (None, predicted):
            raise UserError(
                f"diffusion.prediction_type is {config.prediction_type}, but {parent.name} was trained to predict "
                f"{predicted}; leave it out, or set it to {predicted}."
            )
        config.prediction_type = predicted
    settings = {"beta_schedule": config.noise_schedule, "rescale_betas_zero_snr": config.zero_terminal_snr}
    overrides = {name: value for name, value in settings.items() if value is not None}
    if config.prediction_type == "flow_prediction":
        if config.noise_schedule is not None or config.zero_terminal_snr is False:
            raise UserError(
                "diffusion.prediction_type flow_prediction has a fixed schedule, which ends in pure noise: leave out "
                "diffusion.noise_schedule and diffusion.zero_terminal_snr."
            )
        overrides = {}
    try:
        scheduler = default_scheduler(config.prediction_type, **overrides)
        return scheduler if parent is None else parent_scheduler(parent, **overrides)
    except ValueError as error:
        raise UserError(f"The noise schedule of this config (diffusion) cannot be built: {error}") from error


class DiTTrainer(Trainer):
    """`Trainer` of a `VidTwinTransformer3DModel`."""

    def __init__(
        self,
        config: DiTTrainingConfig,
        accelerator: Accelerator,
        vae: VideoAutoencoder,
        transformer: VidTwinTransformer3DModel,
        scheduler: SchedulerMixin,
        cache: LatentCache,
        validation_cache: LatentCache | None,
        statistics: Statistics,
        classes: Sequence[str],
        parent: Parent | None = None,
        frozen: Sequence[nn.Module] = (),
        fvd: ValidationFVD | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self.vae, self.fvd = vae, fvd
        self.text_encoder = text_encoder
        is_trained = config.text.encoder == SMALL
        self.text_facts = {} if text_encoder is None else describe_text(text_encoder, is_trained, cache.captions)
        self.encoder_hash, self.vae_hash = encoder_hash(vae), weights_hash(vae)
        self.scheduler = scheduler
        self.cache, self.validation_cache = cache, validation_cache
        self.statistics = statistics
        self.classes = list(classes)
        # Ids of the cache's classes in the DiT; the last, which is also that of a clip without a class (-1), is of the
        # null class. An unconditional DiT ignores them.
        ids = [*(self.classes.index(name) if self.classes else 0 for name in cache.classes), len(self.classes)]
        self.label_ids = torch.tensor(ids, device=accelerator.device)
        # Captions are token ids for an encoder of the run, and embeddings of another one. An objective may be sharded,
        # so one that is not trained, and so not averaged, stays whole for validation.
        self.own_encoder = text_encoder.model if config.text.encoder in OWN_ENCODERS else None
        encoder = self.own_encoder if is_trained else deepcopy(self.own_encoder)
        objective = DiffusionLoss(transformer, scheduler, config.diffusion, self.classes, config.text, encoder)
        averaged = groups = None
        if is_trained:
            averaged = nn.ModuleDict({"transformer": transformer, "text_encoder": self.own_encoder})
            groups = {
                "model": ([p for p in transformer.parameters() if p.requires_grad], 1.0),
                "text_encoder": (list(self.own_encoder.parameters()), config.text.lr_scale),
            }
        self.noise_size = transformer.latent_size * (2 if config.latents.sample else 1)
        super().__init__(
            config,
            accelerator,
            objective,
            transformer,
            cache,
            default_collate,
            self.noise_size,
            groups=groups,
            parent=parent,
            frozen=frozen,
            averaged=averaged,
            further_uniforms=objective.num_frame_draws,
        )

    def compute_losses(self, batch: Batch) -> Losses:
        latents, labels, noise, image, text = self._prepare_batch(batch)
        shown_image = self._prepare_image(batch["shown_image"]) if "shown_image" in batch else None
        return self.objective(latents, labels, noise, batch["uniform"], image, text, shown_image)

    def _prepare_batch(self, batch: Batch) -> Prepared:
        """The normalized latents (B, L), the ids of their classes (B,), the noise to add (B, L), images, captions."""
        latents, noise = batch["mean"], batch["noise"]
        if self.config.latents.sample:
            noise, posterior_noise = noise.chunk(2, dim=1)
            latents = latents + TwinPosterior(latents, batch["logvar"]).std * posterior_noise
        labels = self.label_ids[batch["label"]]
        text = (batch["text"], batch["text_mask"]) if self.text_encoder is not None else None
        image = self._prepare_image(batch["image"]) if self.model.config.image_conditioning else None
        return normalize_latents(latents, self.vae, *self.statistics), labels, noise, image, text

    def _prepare_image(self, image: torch.Tensor) -> torch.Tensor:
        """The normalized structure latents (B, L_S) of first frames."""
        packed = F.pad(image, (0, math.prod(self.model.dynamics_shape)))
        return normalize_latents(packed, self.vae, *self.statistics)[:, : image.shape[1]]

    def on_optimizer_step(self, terms: Losses, is_finite: torch.Tensor) -> None:
        self.accelerator.unwrap_model(self.objective).update_average(is_finite)

    def describe_batch(self, batch: Batch) -> list[str]:
        return [self.cache.describe(index) for index in batch["index"].tolist()]

    def facts(self) -> dict[str, Any]:
        hashes = {"encoder weights": self.encoder_hash, "vae weights": self.vae_hash}
        return {**super().facts(), **hashes, **self.text_facts, "classes": self.classes}

    def flops_per_sample(self) -> float:
        # Without a backward pass, which costs two, are the estimate of self-conditioning and the two targets of jumps,
        # of which the first replaces the estimate. A teacher makes two predictions, and two with its estimate.
        num_caption_tokens = 0 if self.cache.captions is None else self.cache.captions.tokens_per_clip
        further = has_estimate = int(self.model.config.self_conditioning)
        if self.config.diffusion.shortcut:
            further = 2 + 2 * (1 + has_estimate) * self.config.diffusion.shortcut_teacher
        num_timesteps = 1 + self.model.num_frame_rows if self.config.diffusion.frame_timesteps else 2
        return transformer_flops(self.model, num_caption_tokens, num_timesteps) * (1 + further / 3)

    def build_pipeline(self, model: DiT) -> VidTwinPipeline:
        """Create the pipeline of a model with the VAE, text encoder, scheduler and classes of this run."""
        id2label = dict(enumerate(self.classes)) or None
        options = {}
        if self.statistics != (self.vae.latents_mean, self.vae.latents_std) or self.vae.backbone is not self.vae:
            options = dict(zip(("latents_mean", "latents_std"), self.statistics, strict=True))
        transformer, text_encoder = self._split(model)
        if self.text_encoder is not None:
            encoder = text_encoder or self.text_encoder.model
            options |= {"text_encoder": encoder, "tokenizer": self.text_encoder.tokenizer}
        pipeline = VidTwinPipeline(self.vae, transformer, self.scheduler, id2label=id2label, **options)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def validation_metrics(self, config: DiTTrainingConfig) -> list[str]:
        return list_validation_metrics(config, self.vae, self.scheduler, self.validation_cache is not None)

    def _split(self, model: DiT) -> tuple[VidTwinTransformer3DModel, nn.Module | None]:
        """The DiT, and the text encoder that is trained with it."""
        return (model["transformer"], model["text_encoder"]) if isinstance(model, nn.ModuleDict) else (model, None)

    def validate(self, model: DiT) -> dict[str, float]:
        """Measure the loss on held-out clips, the FVD and the saturation; draw samples with a fixed seed."""
        values = self._held_out_loss(model) if self.validation_cache is not None else {}
        transformer, _ = self._split(model)
        saturation = measure_saturation(transformer, self.scheduler.config.num_train_timesteps)
        if warning := describe_saturation(saturation):
            self.accelerator.print(f"warning: {warning}")
        values["saturation"] = saturation
        if self.fvd is not None:
            diffusion = self.config.diffusion
            sampling = Sampling(self.config.seed, diffusion.guidance_scale, diffusion.num_inference_steps)
            captions = self.cache.captions
            prompts = [] if captions is None else captions.examples(self.config.validation.num_samples)
            values |= self.fvd.measure_generation(self.build_pipeline(model), sampling, self.state.step, prompts)
        if self.accelerator.is_main_process:
            with skip_non_finite_images(self.state.step, self.accelerator.print):
                self._draw_samples(model)
        self.accelerator.wait_for_everyone()
        return values

    def _held_out_loss(self, model: DiT) -> dict[str, float]:
        transformer, text_encoder = self._split(model)
        text_encoder = text_encoder or self.own_encoder
        return measure_held_out_loss(
            DiffusionLoss(
                transformer,
                self.scheduler,
                replace(self.config.diffusion, shortcut=0.0, shortcut_teacher=False),
                self.classes,
                self.config.text,
                text_encoder,
            ),
            self.validation_cache,
            self._prepare_batch,
            self.accelerator,
            noise_size=self.noise_size,
            num_clips=self.config.validation.num_clips,
            num_bins=self.config.validation.timestep_bins,
            seed=self.config.seed,
        )

    def _draw_samples(self, model: DiT) -> None:
        diffusion = self.config.diffusion
        classes = self.classes[:SAMPLE_CLASSES]
        inputs = {"class_labels": list(range(len(classes))) or None}
        if self.cache.captions is not None:
            held_out = self.validation_cache and self.validation_cache.captions.examples(SAMPLE_CLASSES)
            prompts = held_out or self.cache.captions.examples(SAMPLE_CLASSES)  # held-out clips may have no captions
            inputs, classes = {"prompt": prompts}, [prompt[:LABEL_CHARACTERS] for prompt in prompts]
        frames = self.build_pipeline(model)(
            **inputs,
            guidance_scale=diffusion.guidance_scale,
            num_inference_steps=diffusion.num_inference_steps,
            generator=torch.Generator().manual_seed(self.config.seed),
            output_type="pt",
        ).frames
        clips = 2 * frames.transpose(1, 2) - 1
        path = self.output_dir / "samples" / f"step-{self.state.step}"
        grid = class_grid(path.with_suffix(".png"), clips, classes or ["sample"])
        fps = self.config.data.fps
        video = save_clip_grid_video(path.with_suffix(".gif"), clips, fps, columns=4, labels=classes or None)
        self.log_media({"samples": grid, "samples_video": video})

    def write_model(self, model: DiT, folder: Path, destination: Path) -> None:
        """Write the pipeline with the averaged DiT, or the averaged adapter of LoRA."""
        if self.config.lora.rank:
            write_lora(model, folder, str(destination))
            return
        pipeline = self.build_pipeline(model)
        pipeline.save_pretrained(folder)
        pipeline.model_card(destination.parent.name).save(folder / "README.md")

    def report_final(self, folder: Path) -> None:
        if self.config.lora.rank:
            self.accelerator.print(
                f"The adapter is saved in {folder}; load it into a pipeline of {self.config.model.pretrained} with "
                f'pipeline.load_lora_weights("{folder}").'
            )
        else:
            self.accelerator.print(f"The trained pipeline is saved in {folder}.")
