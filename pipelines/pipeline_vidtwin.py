"""The pipeline that generates videos: noise, diffusion transformer, VidTwin decoder."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.guiders import BaseGuidance
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import ModelCard
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from autoencoder.adapters import RULES, adapt_to_latents, find_class
from autoencoder.autoencoder_kl_vidtwin import AutoencoderKLVidTwin
from autoencoder.model_card import ModelCardMixin, count_parameters, find_parents, render_card
from autoencoder.video_autoencoder import VideoAutoencoder

from . import bag_of_words  # noqa: F401, registers its text encoder
from .candidates import check_candidates, choose_candidates
from .classes import ClassLabelsMixin
from .conditioning import (
    ConditioningInput,
    ConditioningMixin,
    StreamConditioning,
    check_streams_can_wait,
    get_first_frames,
    get_keep_mask,
    warn_of_shared_timesteps,
)
from .denoiser import Denoiser
from .finite import check_finite_output, check_finite_tensor
from .guidance import apply_guidance, find_guided_steps, warn_of_added_guidance
from .guiders import check_guider, check_no_guidance, predict_with_guider
from .history import History
from .hub import SafeDownloadMixin
from .inputs import CheckInputsMixin, Generator, as_generators, check_generators
from .latents import STREAMS, denormalize_latents, frames_per_position, join_stages, split_stages, spread_streams
from .lora import LoraPipelineMixin
from .motion_classifier import MotionClassifier
from .options import OptionsMixin
from .overlay import apply_overlay
from .pipeline_output import VidTwinPipelineOutput
from .schedulers import check_jumps, clean_timestep, estimate_clean, retrieve_timesteps
from .stream_schedule import StreamSchedule
from .text import Prompt, PromptMixin
from .transformer_vidtwin import VidTwinTransformer3DModel


class VidTwinPipeline(
    ModelCardMixin,
    SafeDownloadMixin,
    CheckInputsMixin,
    ClassLabelsMixin,
    PromptMixin,
    ConditioningMixin,
    LoraPipelineMixin,
    OptionsMixin,
    DiffusionPipeline,
):
    """Generates videos with VidTwin's two latents, by prompts, by class or unconditionally.

    Args:
        vae: decodes latents to clips: a VidTwin, or another video autoencoder of Diffusers or transformers
            (`autoencoder.adapters`). With None the pipeline generates only latents (`output_type="latent"`), which
            stay normalized.
        transformer: the denoiser, with the latent shapes of the autoencoder.
        scheduler: any Diffusers scheduler with the `prediction_type` that the transformer was trained for.
        id2label: class names by id; JSON makes the ids strings.
        latents_mean, latents_std: statistics that undo the normalization, as in `expand_statistic`; None:
            those that the autoencoder states.
        text_encoder, tokenizer: of transformers, for prompts; None: a model with captions takes `prompt_embeds`.
        guider: of `diffusers.guiders`, in place of `guidance_scale` and `guidance_interval`; see `pipelines.guiders`.
        classifier: chooses among `num_candidates` videos by their class; None: only one is sampled.

    Attributes:
        autoencoder: `vae` under the protocol of `VideoAutoencoder`: a VidTwin itself, or the adapter of another class.

    Raises:
        ValueError: if the transformer has other latent shapes or caption channels, a class id is out of its range, or
            the guider does not work with it.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae->classifier"
    _optional_components = ["text_encoder", "tokenizer", "guider", "classifier"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: nn.Module | None,
        transformer: VidTwinTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[str, str] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        guider: BaseGuidance | None = None,
        classifier: MotionClassifier | None = None,
    ) -> None:
        super().__init__()
        autoencoder = None if vae is None else adapt_to_latents(vae, transformer.structure_shape)
        vae = None if vae is None else autoencoder.backbone
        for stream in STREAMS if vae is not None else ():
            latent, expected = getattr(autoencoder, f"{stream}_shape"), getattr(transformer, f"{stream}_shape")
            if tuple(latent) != tuple(expected):
                raise ValueError(
                    f"The transformer was built for {stream} latents {tuple(expected)}, "
                    f"but the autoencoder has {tuple(latent)}."
                )
        id2label = {int(k): v for k, v in (id2label or {}).items()}
        num_classes = transformer.config.num_classes or 0
        for label_id, label in id2label.items():
            if not 0 <= label_id < num_classes:
                raise ValueError(
                    f"id2label has {label!r} as {label_id}, but the transformer has {num_classes} classes."
                )
        channels = transformer.config.get("caption_channels")
        if text_encoder is not None and text_encoder.config.hidden_size != channels:
            raise ValueError(
                f"The transformer was built for captions of {channels or 'no'} channels, but the text encoder has "
                f"{text_encoder.config.hidden_size}."
            )
        if guider is not None:
            check_guider(guider, transformer)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer, guider=guider, classifier=classifier)
        self.register_to_config(
            id2label={str(k): v for k, v in id2label.items()}, latents_mean=latents_mean, latents_std=latents_std
        )
        self._autoencoder = autoencoder
        self.video_processor = VideoProcessor(do_resize=False)

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        """Diffusers' method, which `from_pipe` compares components with: all classes that can be the autoencoder."""
        vae = (AutoencoderKLVidTwin, *(find_class(name) for name in RULES if name in dir(diffusers)), nn.Module)
        return super()._get_signature_types() | {"vae": vae}

    def model_card(self, repo_id: str) -> ModelCard:
        """Render the README.md that `push_to_hub` uploads.

        Args:
            repo_id: "user/name", which the card's example loads.
        """
        vae, transformer = self.autoencoder, self.transformer
        return render_card(
            Path(__file__).with_name("pipeline_card.md.jinja"),
            repo_id,
            tags=["vidtwin", "video-generation", *transformer.conditioning_tags()],
            parents=find_parents(transformer=transformer, vae=vae),
            **transformer.card_facts(),
            labels=self.labels,
            subclasses=self.subclasses,
            scheduler=type(self.scheduler).__name__,
            prediction_type=self.scheduler.config.get("prediction_type", "flow"),
            clip_shape=None if vae is None else vae.clip_shape,
            text_encoder=None if self.text_encoder is None else type(self.text_encoder).__name__,
            text_encoder_parameters=None if self.text_encoder is None else count_parameters(self.text_encoder),
            vae_parameters=None if vae is None else count_parameters(vae),
            classifier_parameters=None if self.classifier is None else count_parameters(self.classifier),
            compression_rate=None if vae is None else vae.compression_rate,
        )

    @property
    def autoencoder(self) -> VideoAutoencoder | None:
        """`vae` under the protocol of `VideoAutoencoder`, also after `vae` was replaced."""
        if self.vae is None:
            return None
        if self._autoencoder is None or self.vae not in (self._autoencoder, self._autoencoder.backbone):
            self._autoencoder = adapt_to_latents(self.vae, self.transformer.structure_shape)
        return self._autoencoder

    @property
    def guidance_scale(self) -> float | tuple[float, float]:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        scale = self._guidance_scale
        return (max(scale) if isinstance(scale, tuple) else scale) > 1 and self._is_conditional

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def prepare_latents(
        self, batch_size: int, generator: Generator, latents: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Draw standard normal noise (B, L) in float32, or check the caller's.

        Raises:
            ValueError: if the caller's noise has another shape or is not finite, or a list of generators has another
                length than B.
        """
        shape = (batch_size, self.transformer.latent_size)
        check_generators(generator, batch_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must be (B, L) = {shape}, but have shape {tuple(latents.shape)}.")
        check_finite_tensor("latents", latents)
        return latents.to(device, torch.float32)

    def prepare_extra_step_kwargs(self, generator: Generator, eta: float) -> dict[str, Any]:
        """Return the arguments, of generator and eta, that the scheduler's `step` takes."""
        # DDIM takes the root of 1 - alpha - sigma^2, which at eta = 1 and zero terminal SNR rounds to below zero.
        extra = {"eta": min(eta, 1 - 1e-5), "generator": generator}
        return {k: v for k, v in extra.items() if k in inspect.signature(self.scheduler.step).parameters}

    def prepare_modulations(
        self, timesteps: torch.Tensor, labels: torch.Tensor | None, target_timesteps: torch.Tensor | None = None
    ) -> list[torch.Tensor] | None:
        """Compute `transformer.modulations` of all steps at once, which reads their weights only once.

        Args:
            timesteps: (N,), or (N, 2) with one per stream, or (N, 1 + R) with one per row of dynamics frames.
            labels: (B,), or None for an unconditional model.
            target_timesteps: those that the steps lead to, in the same shape, for a model with interval conditioning.

        Returns:
            For each layer (N, 2 B, 2 or 1 + R, ...), B rows of the classes and B rows of "no class", or one row
            without labels. None if they depend on captions too, would take more memory than those weights, or the
            weights are offloaded.
        """
        device, transformer = self._execution_device, self.transformer
        if labels is not None:  # with both halves, since callbacks may change guidance
            labels = torch.cat([labels, torch.full_like(labels, transformer.config.num_classes)])
        rows = 1 if labels is None else len(labels)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        offloaded = transformer.device != device or _is_group_offload_enabled(transformer)
        per_step = 2 if timesteps.ndim == 1 else timesteps.shape[1]
        if transformer.config.caption_pooling or offloaded or per_step * rows * len(timesteps) > width:
            return None
        labels = None if labels is None else labels.repeat(len(timesteps))
        timesteps, target_timesteps = (
            None if x is None else x.to(device).repeat_interleave(rows, dim=0) for x in (timesteps, target_timesteps)
        )
        layers = transformer.modulations(timesteps, labels, target_timesteps)
        return [layer.unflatten(0, (-1, rows)) for layer in layers]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        num_videos_per_prompt: int = 1,
        guidance_scale: float | tuple[float, float] | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        structure: ConditioningInput | None = None,
        dynamics: ConditioningInput | None = None,
        structure_strength: float = 0.0,
        dynamics_strength: float = 0.0,
        structure_delay: float = 0.0,
        temperature: float = 1.0,
        kept_frames: Sequence[int] = (),
        history_noise: float | None = None,
        history_guidance_scale: float = 1.0,
        image: ConditioningInput | None = None,
        overlay_image: bool = True,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        structure_prompt: Prompt = None,
        dynamics_prompt: Prompt = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        num_candidates: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> VidTwinPipelineOutput | tuple:
        """Generate videos, from noise or conditioned on an image or on one or both streams, by prompt or class.

        With `image` the model generates both streams of a clip that begins with it (image-to-video), which requires a
        transformer with `image_conditioning`. With `structure` it generates dynamics, and with `dynamics` structure
        (motion transfer); a strength above 0 varies the conditioning itself. This requires a model trained with a
        timestep per stream (`diffusion.independent_timesteps`).

        Args:
            class_labels: ids or names, one video each (see `labels` and `subclasses`); None: one video without class.
                Each video of a class with subclasses is of one of them, drawn uniformly by `generator`, unless there
                is conditioning.
            num_videos_per_prompt: videos per class and prompt, consecutive in the result.
            guidance_scale: classifier-free guidance above 1 (the paper: 5); or (structure, dynamics), which guide
                content and motion separately. None: 5, or 1 for a transformer with interval conditioning, whose
                training includes guidance (`diffusion.shortcut_guidance`), or a pipeline with a guider. Further
                guidance distorts the clips of such a transformer, unless it was trained with a guidance of 1.
            num_inference_steps: denoising steps; with interval conditioning four or fewer suffice.
            timesteps, sigmas: a custom schedule, for schedulers that support it.
            eta: noise of DDIM's steps, 0 to 1.
            guidance_interval: noise levels (lower, upper] with guidance, as fractions of the training timesteps: 0 is
                clean, 1 pure noise. Other steps cost half (Kynkäänniemi et al., arXiv 2404.07724).
            structure, dynamics: conditioning inputs: clips, images or latents, one or one per class or prompt; see
                `encode_conditioning`.
            structure_strength, dynamics_strength: fraction of denoising steps applied to the conditioning latent (0:
                unchanged, 1: ignored), as in image-to-image pipelines.
            structure_delay: fraction of `num_inference_steps` by which structure is denoised later than dynamics, so
                that content is decided to suit the motion. It adds that fraction of steps.
            temperature: factor on the noise that generated streams start from. Below 1 clips are more alike and more
                typical: an animated image moves as the class or prompt says, and its background stays; a generated
                first frame loses detail.
            kept_frames: frames whose `dynamics` are kept at any strength; the others are generated around them.
            history_noise: noise level at which the transformer sees kept frames, from 0, clean, to below 1, for a
                model trained with `diffusion.frame_timesteps`; None: the level of the other frames, as in RePaint.
            history_guidance_scale: guidance by kept frames above 1, which costs a third batch row (arXiv 2502.06764).
            image: the first frame: an image, a clip or the structure latents of an image, one or one per class or
                prompt; see `encode_conditioning`. Without it a model with `image_residual` takes that of
                `structure`, or generates it first, with the same number of steps.
            overlay_image: whether a frame shows `image`, if that is given in pixels, where it differs little from the
                first frame of the clip: the image is sharper than decoded frames. Latent output has no overlay.
            prompt: what the videos show, one text or a list, for a transformer with `caption_channels`. Prompts and
                classes can be combined.
            negative_prompt: what guidance leads away from; None: the learned token for "no caption". It has no
                effect without guidance, as in Diffusers.
            structure_prompt, dynamics_prompt: for content and motion, in place of `prompt`.
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask: embeddings
                instead of prompts, from `encode_prompt`.
            max_sequence_length: tokens to which prompts are cut; None: the maximum of the tokenizer.
            num_candidates: videos sampled for each one that is returned: that whose class `classifier` finds the most
                probable. Time and memory are those of sampling all of them.
            generator: one for all videos, or a list with one per video, which draws all its candidates.
            latents: standard normal noise (B, L) to start from, with a row per candidate.
            output_type: "pil", "np", "pt" or "latent"; see `VidTwinPipelineOutput`.
            return_dict: whether to return a `VidTwinPipelineOutput` or a tuple.
            callback_on_step_end: (pipeline, step, timestep, tensors by name) -> dict of tensors to continue with; not
                called for the steps of a first frame.
            callback_on_step_end_tensor_inputs: names of the tensors passed to it; only "latents".

        Raises:
            ValueError: for an unknown class, an id out of range, a shape or value that does not fit or is not finite,
                a guidance interval that the scheduler or the cache does not support, guidance beside a guider,
                `structure_delay` beside a given stream, or candidates without a classifier that knows their classes.
            NonFiniteError: a ValueError, if the transformer or the autoencoder outputs NaN or infinite values. Its
                message names the dtype of that model, and one to use instead.
        """
        # 1. Check inputs. Raise an error if they are not correct.
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        generator = as_generators(generator)
        has_intervals = self.transformer.config.interval_conditioning
        if self.guider is not None:
            check_guider(self.guider, self.transformer, self._execution_device)
            check_no_guidance(self.guider, guidance_scale, guidance_interval, history_guidance_scale)
        if guidance_scale is None:
            guidance_scale = 1.0 if has_intervals or self.guider is not None else 5.0
        self.check_inputs(
            num_videos_per_prompt,
            num_candidates,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            guidance_interval,
            structure_strength,
            dynamics_strength,
            structure_delay,
            temperature,
            structure,
            dynamics,
            kept_frames,
            history_noise,
            history_guidance_scale,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = tuple(guidance_scale) if isinstance(guidance_scale, list) else guidance_scale
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device
        sizes = self._stream_sizes

        # 2. Encode prompts, and prepare conditioning latents and class labels.
        null_class = self.transformer.config.num_classes
        label_ids = [null_class] if class_labels is None else self.get_label_ids(class_labels)
        if num_candidates > 1:
            check_candidates(self.classifier, self.get_label_names(label_ids), output_type)
        prompts = self.prepare_prompts(
            prompt,
            negative_prompt,
            structure_prompt=structure_prompt,
            dynamics_prompt=dynamics_prompt,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
        )
        self._is_conditional = class_labels is not None or prompts is not None
        if has_intervals and (self.do_classifier_free_guidance or self.guider is not None):
            warn_of_added_guidance()
        conditioning_inputs = {"structure": structure, "dynamics": dynamics, "image": image}
        conditioning_inputs = {name: value for name, value in conditioning_inputs.items() if value is not None}
        counts = {"class_labels": len(label_ids), "prompt": 1 if prompts is None else len(prompts[0].mask)}
        clean, image_latents, count = self.prepare_conditioning(conditioning_inputs, counts, device)
        photos = None
        if image is not None and overlay_image:
            photos = get_first_frames(image, self.autoencoder, "image")
        num_videos = num_videos_per_prompt * num_candidates  # per prompt, candidates of a video consecutive
        if num_candidates > 1 and isinstance(generator, list):
            check_generators(generator, count * num_videos_per_prompt)
            generator = [each for each in generator for _ in range(num_candidates)]
        text_inputs = self.get_text_inputs(prompts, count, num_videos)
        labels = None
        if null_class is not None:
            label_ids = label_ids * count if len(label_ids) == 1 else label_ids
            label_names = self.get_label_names(label_ids)
            label_ids = [label for label in label_ids for _ in range(num_videos)]
            if not conditioning_inputs:
                label_ids = self.draw_subclasses(label_ids, generator)
            labels = torch.tensor(label_ids, device=device)

        # 3. Prepare timesteps.
        timesteps = retrieve_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        schedule = StreamSchedule(timesteps)
        if clean is not None:
            strengths = (
                1.0 if structure is None else structure_strength,
                1.0 if dynamics is None else dynamics_strength,
            )
            schedule = StreamSchedule.from_strengths(timesteps, strengths)
        elif structure_delay:
            schedule = StreamSchedule.with_structure_delay(timesteps, structure_delay)
        if any(schedule.waits):
            check_streams_can_wait(self.scheduler)
            warn_of_shared_timesteps(self.transformer, schedule)
        if has_intervals:
            check_jumps(self.scheduler, eta)
        self._num_timesteps = len(schedule)
        group, history = frames_per_position(self.autoencoder), None
        if history_noise is not None:
            positions = [frame // group for frame in kept_frames]
            history = History(self.transformer, self.scheduler, positions, history_noise, history_guidance_scale)

        # 4. Generate the first frame, if that is a stage of the model and none is given.
        batch_size = count * num_videos
        denoise = partial(
            self._denoise,
            labels=labels,
            text_inputs=text_inputs,
            guidance_interval=guidance_interval,
            temperature=temperature,
            extra_step_kwargs=self.prepare_extra_step_kwargs(generator, eta),
        )
        if image_latents is not None:
            image_latents = image_latents.repeat_interleave(num_videos, dim=0)
        elif self.transformer.config.image_residual:
            noise = self.prepare_latents(batch_size, generator, None, device)
            still = denoise(noise, StreamSchedule(timesteps), copy.deepcopy(self.scheduler))
            image_latents = still[:, : sizes[0]]

        # 5. Prepare noise, and the given streams.
        noise = self.prepare_latents(batch_size, generator, latents, device)
        conditioning = None
        if clean is not None:
            clean = clean.repeat_interleave(num_videos, dim=0)
            if self.transformer.config.image_residual:
                clean = split_stages(clean, image_latents, self.transformer.config.image_residual)
            shapes = self.transformer.structure_shape, self.transformer.dynamics_shape
            keep = get_keep_mask(kept_frames, *shapes, device, group)
            conditioning = StreamConditioning(clean, schedule, sizes, keep, shapes[1][0])

        # 6. Denoise.
        def call_back(step: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return latents
            tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
            outputs = callback_on_step_end(self, step, t, tensors)
            if not isinstance(outputs, dict):
                raise ValueError(f"callback_on_step_end must return a dict of tensors, not {type(outputs).__name__}.")
            return outputs.pop("latents", latents)

        stages = {"image_latents": image_latents, "conditioning": conditioning, "history": history}
        latents = denoise(noise, schedule, self.scheduler, **stages, on_step_end=call_back)
        if self.transformer.config.image_residual:
            latents = join_stages(latents, image_latents, self.transformer.config.image_residual)

        # 7. Decode.
        frames = latents
        if self.vae is not None:
            frames = denormalize_latents(latents, self.autoencoder, *self.latent_statistics)
        if output_type == "latent":
            check_finite_output("the transformer", latents, self.transformer)
        else:
            rounds = frames.to(self.vae.dtype).unflatten(0, (-1, num_candidates)).unbind(dim=1)
            candidates = [self.autoencoder.decode(latent, return_dict=False)[0] for latent in rounds]
            if not all(clips.isfinite().all() for clips in candidates):  # waits for the device only here
                check_finite_output("the transformer", latents, self.transformer)
                for clips in candidates:
                    check_finite_output("the autoencoder", clips, self.vae)
            if photos is not None:
                photos = photos.to(device).expand(count, -1, -1, -1).repeat_interleave(num_videos_per_prompt, dim=0)
                candidates = [apply_overlay(clips, photos) for clips in candidates]
            clips = candidates[0]
            if num_candidates > 1:
                label_names = [name for name in label_names for _ in range(num_videos_per_prompt)]
                clips = choose_candidates(candidates, label_names, self.classifier)
            frames = self.video_processor.postprocess_video(clips, output_type=output_type)

        # 8. Offload all models.
        self.maybe_free_model_hooks()
        return VidTwinPipelineOutput(frames=frames) if return_dict else (frames,)

    def _denoise(
        self,
        noise: torch.Tensor,
        schedule: StreamSchedule,
        scheduler: KarrasDiffusionSchedulers,
        *,
        labels: torch.Tensor | None,
        text_inputs: dict[str, dict[str, torch.Tensor]],
        guidance_interval: tuple[float, float],
        temperature: float,
        extra_step_kwargs: dict[str, Any],
        image_latents: torch.Tensor | None = None,
        conditioning: StreamConditioning | None = None,
        history: History | None = None,
        on_step_end: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Denoise noise (B, L) to clean latents (B, L). No step waits for a GPU: schedulers count on the CPU.

        Args:
            noise: standard normal.
            schedule: of the streams.
            scheduler: whose timesteps are set.
            labels, text_inputs, image_latents: as in `Denoiser`.
            guidance_interval, temperature: as in the pipeline.
            extra_step_kwargs: arguments of the scheduler's `step`.
            conditioning: streams that are given; None: both are generated.
            history: kept frames with a noise level for themselves.
            on_step_end: (step, timestep, latents) -> latents to continue with.
        """
        batch_size, sizes = len(noise), self._stream_sizes
        has_intervals = self.transformer.config.interval_conditioning
        guided_steps = schedule.is_any(find_guided_steps(scheduler, schedule.timesteps, guidance_interval))
        if self.do_classifier_free_guidance and len(set(guided_steps)) > 1:
            self.transformer.check_cache_can_restart()

        # Solvers depend on their previous steps, which differ where one stream starts later.
        is_split = len(schedule.waits) > 1
        solvers = [scheduler, copy.deepcopy(scheduler)] if is_split else [scheduler]
        solver_sizes = sizes if is_split else (sum(sizes),)

        # Start from noise, or from given streams.
        noise = noise * getattr(scheduler, "init_noise_sigma", 1.0)  # schedulers for flow matching have none
        latents = (
            temperature * noise if conditioning is None else conditioning.initialize(scheduler, noise, temperature)
        )
        model_timesteps, target_timesteps = schedule.model_timesteps(), None
        if has_intervals:
            target_timesteps = schedule.target_timesteps(clean_timestep(scheduler))
            target_timesteps = target_timesteps if history is None else history.spread_timesteps(target_timesteps)
        model_timesteps = model_timesteps if history is None else history.spread_timesteps(model_timesteps)
        modulations = self.prepare_modulations(model_timesteps, labels, target_timesteps)
        model_timesteps = model_timesteps.to(noise.device)
        target_timesteps = None if target_timesteps is None else target_timesteps.to(noise.device)

        estimate = None  # of the clean latents, for self-conditioning
        denoiser = Denoiser(self.transformer, labels, text_inputs, modulations, image_latents)
        with self.progress_bar(total=len(schedule)) as progress_bar:
            for i in range(len(schedule)):
                if self.interrupt:
                    break
                self._current_timestep = t = schedule.latest(i)
                if conditioning is not None:
                    latents = conditioning.restore_kept(scheduler, model_timesteps[i], latents, noise)

                # 1. Prepare the inputs of the transformer.
                model_input = latents
                if hasattr(scheduler, "scale_model_input"):
                    model_input = scheduler.scale_model_input(latents, t)
                timestep = model_timesteps[i].expand(batch_size, *model_timesteps.shape[1:])
                target = None if target_timesteps is None else target_timesteps[i].expand(timestep.shape)

                # 2. Predict, and apply guidance.
                inputs = {"latents": model_input, "timestep": timestep, "target_timestep": target}
                predict = partial(denoiser, step=i, self_condition=estimate, **inputs)
                if self.guider is not None:
                    self.guider.set_state(step=i, num_inference_steps=len(schedule), timestep=t)
                    prediction = predict_with_guider(self.guider, self.transformer, predict)
                elif guided_steps[i] and self.do_classifier_free_guidance:
                    both = predict("both")
                    conditional = both[:batch_size]
                    prediction = apply_guidance(both, self.guidance_scale, sizes)
                else:
                    conditional = prediction = predict("conditional")
                if history is not None and history.guidance_scale != 1:
                    tensors = conditional, model_input, timestep, noise
                    history_inputs = {"class_labels": labels, "image_latents": denoiser.image_latents}
                    history_inputs |= text_inputs["conditional"]
                    prediction = history.guide(prediction, *tensors, sizes, target_timestep=target, **history_inputs)
                prediction = prediction.to(latents.dtype)

                # 3. Estimate the clean latents for self-conditioning, which jumps are trained without.
                if self.transformer.config.self_conditioning and not has_intervals:
                    levels = timestep
                    if is_split:
                        levels = spread_streams(timestep, sizes, self.transformer.dynamics_shape[0])
                    estimate = estimate_clean(scheduler, prediction, levels, model_input)

                # 4. Compute the previous noisy latents x_t -> x_t-1 of every stream that does not wait.
                streams = list(latents.split(solver_sizes, dim=1))
                for j, stream_prediction in enumerate(prediction.split(solver_sizes, dim=1)):
                    if (stream_timestep := schedule.at(j, i)) is not None:
                        # With a third axis, since some schedulers (thresholding) need more than batch and channel.
                        args = stream_prediction[..., None], stream_timestep, streams[j][..., None]
                        streams[j] = solvers[j].step(*args, **extra_step_kwargs, return_dict=False)[0].squeeze(-1)
                latents = torch.cat(streams, dim=1)

                progress_bar.update()
                if on_step_end is not None:
                    latents = on_step_end(i, t, latents)
        if conditioning is not None:
            latents = conditioning.restore_kept(scheduler, None, latents, noise)
        self._current_timestep = None
        return latents
