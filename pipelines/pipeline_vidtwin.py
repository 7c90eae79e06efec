"""The pipeline that generates videos: noise, diffusion transformer, VidTwin decoder."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import ModelCard
from torch import nn

from autoencoder.adapters import RULES, adapt_to_latents, find_class
from autoencoder.autoencoder_kl_vidtwin import AutoencoderKLVidTwin
from autoencoder.model_card import ModelCardMixin, count_parameters, find_parents, render_card
from autoencoder.video_autoencoder import VideoAutoencoder

from .classes import ClassLabelsMixin
from .conditioning import (
    ConditioningInput,
    StreamConditioning,
    encode_conditioning,
    get_keep_mask,
    get_start_steps,
    get_stream_timesteps,
)
from .finite import check_finite_number, check_finite_output, check_finite_tensor
from .guidance import apply_guidance, find_guided_steps
from .hub import SafeDownloadMixin
from .inputs import Generator, as_generators, check_generators, check_numbers, check_whole_numbers
from .latents import STREAMS, denormalize_latents, frames_per_position, normalize_latents, spread_streams
from .lora import LoraPipelineMixin
from .options import OptionsMixin
from .pipeline_output import VidTwinPipelineOutput
from .schedulers import estimate_clean, retrieve_timesteps
from .transformer_vidtwin import VidTwinTransformer3DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VidTwinPipeline(
    ModelCardMixin, SafeDownloadMixin, ClassLabelsMixin, LoraPipelineMixin, OptionsMixin, DiffusionPipeline
):
    """Generates videos with VidTwin's two latents, by class or unconditionally.

    Args:
        vae: decodes latents to clips: a VidTwin, or another video autoencoder of Diffusers or transformers
            (`autoencoder.adapters`). With None the pipeline generates only latents (`output_type="latent"`), which
            stay normalized.
        transformer: the denoiser, with the latent shapes of the autoencoder.
        scheduler: any Diffusers scheduler with the `prediction_type` that the transformer was trained for.
        id2label: class names by id; JSON makes the ids strings.
        latents_mean, latents_std: statistics that undo the normalization, as in `expand_statistic`; None:
            those that the autoencoder states.

    Attributes:
        autoencoder: `vae` under the protocol of `VideoAutoencoder`: a VidTwin itself, or the adapter of another class.

    Raises:
        ValueError: if the transformer has other latent shapes, or a class id is out of its range.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: nn.Module | None,
        transformer: VidTwinTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[str, str] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
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
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
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
        vae, transformer, num_classes = self.autoencoder, self.transformer, self.transformer.config.num_classes
        return render_card(
            Path(__file__).with_name("pipeline_card.md.jinja"),
            repo_id,
            tags=["vidtwin", "video-generation", "unconditional" if num_classes is None else "class-conditional"],
            parents=find_parents(transformer=transformer, vae=vae),
            **transformer.card_facts(),
            labels=self.labels,
            subclasses=self.subclasses,
            scheduler=type(self.scheduler).__name__,
            prediction_type=self.scheduler.config.get("prediction_type", "flow"),
            clip_shape=None if vae is None else vae.clip_shape,
            vae_parameters=None if vae is None else count_parameters(vae),
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
        return (max(scale) if isinstance(scale, tuple) else scale) > 1 and self._has_class

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        num_videos_per_prompt: int,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        guidance_scale: float | tuple[float, float],
        guidance_interval: tuple[float, float],
        structure_strength: float,
        dynamics_strength: float,
        dynamics: ConditioningInput | None,
        kept_frames: Sequence[int],
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a `ValueError` for an argument of a wrong type or out of range."""
        counts = {"num_videos_per_prompt": num_videos_per_prompt, "num_inference_steps": num_inference_steps}
        strengths = {"structure_strength": structure_strength, "dynamics_strength": dynamics_strength}
        check_whole_numbers(**counts, kept_frames=kept_frames)
        check_numbers(guidance_scale=guidance_scale, guidance_interval=guidance_interval, **strengths, eta=eta)
        for name, value in counts.items():
            if not 1 <= value < math.inf:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        check_finite_number("guidance_scale", guidance_scale)
        for name, schedule in {"timesteps": timesteps, "sigmas": sigmas}.items():
            if schedule is not None:
                check_finite_number(name, list(schedule))
        if isinstance(guidance_scale, tuple | list) and len(guidance_scale) != 2:
            raise ValueError(f"guidance_scale must be a number or (structure, dynamics), not {guidance_scale}.")
        if (
            not isinstance(guidance_interval, tuple | list)
            or len(guidance_interval) != 2
            or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                "guidance_interval must be (lower, upper) with 0 <= lower <= upper <= 1, where 0 is clean and 1 pure "
                f"noise, not {guidance_interval}."
            )
        for name, value in {**strengths, "eta": eta}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value}.")
        if kept_frames and dynamics is None:
            raise ValueError("kept_frames requires `dynamics`.")
        if kept_frames and not math.prod(self.transformer.dynamics_shape):
            raise ValueError("kept_frames requires an autoencoder with a dynamics latent.")
        frames = self.transformer.dynamics_shape[1] * frames_per_position(self.autoencoder)
        if not all(0 <= frame < frames for frame in kept_frames):
            raise ValueError(f"kept_frames must be in 0 to {frames - 1}, not {list(kept_frames)}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")
        if self.vae is None and output_type != "latent":
            raise ValueError(f'Without a vae output_type must be "latent", not {output_type!r}.')
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, not "
                f"{sorted(unknown)}."
            )

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

    def prepare_conditioning(
        self, conditions: dict[str, ConditioningInput], num_labels: int, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """Encode conditioning inputs to normalized latents; one input or one label serves all N videos.

        Args:
            conditions: inputs by name: `structure`, `dynamics`, `image`.
            num_labels: number of class labels.
            device: to encode on.

        Returns:
            The latents of the streams (N, L), where a stream without an input is arbitrary, or None without such
            inputs; the structure latents of the images (N, L_S), or None; and the number N of videos.

        Raises:
            ValueError: if there is no autoencoder, or an input does not fit it or is neither one nor N.
        """
        if not conditions:
            return None, None, num_labels
        if self.vae is None:
            raise ValueError(f"{' and '.join(conditions)}: conditioning requires a vae, but this pipeline has none.")
        if "image" in conditions and self.transformer.image_embed is None:
            raise ValueError("image: this pipeline's transformer has no image_conditioning; pass structure instead.")
        vae, encoded = self.autoencoder, {}
        for name, value in conditions.items():
            stream, is_image = ("structure", True) if name == "image" else (name, False)
            encoded[name] = encode_conditioning(value, stream, vae, device, is_image)
        counts = {"class_labels": num_labels, **{name: len(latents) for name, latents in encoded.items()}}
        count = max(counts.values())
        for name, number in counts.items():
            if number not in (1, count):
                raise ValueError(f"{name} has length {number}, but the batch size is {count}: pass one, or {count}.")

        def normalize(**streams: torch.Tensor) -> torch.Tensor:
            parts = [
                streams[name].expand(count, -1) if name in streams else torch.zeros(count, size, device=device)
                for name, size in zip(STREAMS, self._stream_sizes, strict=True)
            ]
            return normalize_latents(torch.cat(parts, dim=1), vae, *self.latent_statistics)

        image = encoded.pop("image", None)
        if image is not None:
            image = normalize(structure=image)[:, : self._stream_sizes[0]]
        return normalize(**encoded) if encoded else None, image, count

    def prepare_extra_step_kwargs(self, generator: Generator, eta: float) -> dict[str, Any]:
        """Return the arguments, of generator and eta, that the scheduler's `step` takes."""
        # DDIM takes the root of 1 - alpha - sigma^2, which at eta = 1 and zero terminal SNR rounds to below zero.
        extra = {"eta": min(eta, 1 - 1e-5), "generator": generator}
        return {k: v for k, v in extra.items() if k in inspect.signature(self.scheduler.step).parameters}

    def prepare_modulations(self, timesteps: torch.Tensor, labels: torch.Tensor | None) -> list[torch.Tensor] | None:
        """Compute `transformer.modulations` of all steps at once, which reads their weights only once.

        Args:
            timesteps: (N,), or (N, 2) with one per stream.
            labels: (B,), or None for an unconditional model.

        Returns:
            For each layer (N, 2 B, 2, ...), B rows of the classes and B rows of "no class", or one row without labels.
            None if they would take more memory than those weights, or the weights are offloaded.
        """
        device, transformer = self._execution_device, self.transformer
        if labels is not None:  # with both halves, since callbacks may change guidance
            labels = torch.cat([labels, torch.full_like(labels, transformer.config.num_classes)])
        rows = 1 if labels is None else len(labels)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        offloaded = transformer.device != device or _is_group_offload_enabled(transformer)
        if offloaded or 2 * rows * len(timesteps) > width:
            return None
        labels = None if labels is None else labels.repeat(len(timesteps))
        layers = transformer.modulations(timesteps.to(device).repeat_interleave(rows, dim=0), labels)
        return [layer.unflatten(0, (-1, rows)) for layer in layers]

    @property
    def latent_statistics(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation of the latents: those of this pipeline's config, else of the autoencoder."""
        if self.config.latents_mean is not None:
            return self.config.latents_mean, self.config.latents_std
        return self.autoencoder.latents_mean, self.autoencoder.latents_std

    @property
    def _stream_sizes(self) -> tuple[int, int]:
        return math.prod(self.transformer.structure_shape), math.prod(self.transformer.dynamics_shape)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | None = None,
        num_videos_per_prompt: int = 1,
        guidance_scale: float | tuple[float, float] = 5.0,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        structure: ConditioningInput | None = None,
        dynamics: ConditioningInput | None = None,
        structure_strength: float = 0.0,
        dynamics_strength: float = 0.0,
        kept_frames: Sequence[int] = (),
        image: ConditioningInput | None = None,
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
        """Generate videos, from noise or conditioned on an image or on one or both streams.

        With `image` the model generates both streams of a clip that begins with it (image-to-video), which requires a
        transformer with `image_conditioning`. With `structure` it generates dynamics, and with `dynamics` structure
        (motion transfer); a strength above 0 varies the conditioning itself. This requires a model trained with a
        timestep per stream (`diffusion.independent_timesteps`).

        Args:
            class_labels: ids or names, one video each (see `labels` and `subclasses`); None: one video without class.
                Each video of a class with subclasses is of one of them, drawn uniformly by `generator`, unless there
                is conditioning.
            num_videos_per_prompt: videos per class, consecutive in the result.
            guidance_scale: classifier-free guidance above 1 (the paper: 5); or (structure, dynamics), which guide
                content and motion separately.
            num_inference_steps: denoising steps.
            timesteps, sigmas: a custom schedule, for schedulers that support it.
            eta: noise of DDIM's steps, 0 to 1.
            guidance_interval: noise levels (lower, upper] with guidance, as fractions of the training timesteps: 0 is
                clean, 1 pure noise. Other steps cost half (Kynkäänniemi et al., arXiv 2404.07724).
            structure, dynamics: conditioning inputs: clips, images or latents, one or one per class; see
                `encode_conditioning`.
            structure_strength, dynamics_strength: fraction of denoising steps applied to the conditioning latent (0:
                unchanged, 1: ignored), as in image-to-image pipelines.
            kept_frames: frames whose `dynamics` are kept at any strength; the others are generated around them.
            image: the first frame: an image, a clip or the structure latents of an image, one or one per class; see
                `encode_conditioning`.
            generator: one for all videos, or a list with one per video.
            latents: standard normal noise (B, L) to start from.
            output_type: "pil", "np", "pt" or "latent"; see `VidTwinPipelineOutput`.
            return_dict: whether to return a `VidTwinPipelineOutput` or a tuple.
            callback_on_step_end: (pipeline, step, timestep, tensors by name) -> dict of tensors to continue with.
            callback_on_step_end_tensor_inputs: names of the tensors passed to it; only "latents".

        Raises:
            ValueError: for an unknown class, an id out of range, a shape or value that does not fit or is not finite,
                or a guidance interval that the scheduler or the cache does not support.
            NonFiniteError: a ValueError, if the transformer or the autoencoder outputs NaN or infinite values. Its
                message names the dtype of that model, and one to use instead.
        """
        # 1. Check inputs. Raise an error if they are not correct.
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        generator = as_generators(generator)
        self.check_inputs(
            num_videos_per_prompt,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            guidance_interval,
            structure_strength,
            dynamics_strength,
            dynamics,
            kept_frames,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        self._guidance_scale = tuple(guidance_scale) if isinstance(guidance_scale, list) else guidance_scale
        self._has_class = class_labels is not None
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device
        sizes = self._stream_sizes

        # 2. Prepare conditioning latents and class labels.
        null_class = self.transformer.config.num_classes
        label_ids = [null_class] if class_labels is None else self.get_label_ids(class_labels)
        conditions = {"structure": structure, "dynamics": dynamics, "image": image}
        conditions = {name: value for name, value in conditions.items() if value is not None}
        clean, image_latents, count = self.prepare_conditioning(conditions, len(label_ids), device)
        labels = None
        if null_class is not None:
            label_ids = label_ids * count if len(label_ids) == 1 else label_ids
            label_ids = [label for label in label_ids for _ in range(num_videos_per_prompt)]
            if not conditions:
                label_ids = self.draw_subclasses(label_ids, generator)
            labels = torch.tensor(label_ids, device=device)

        # 3. Prepare timesteps, and the steps with guidance.
        timesteps = retrieve_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        self._num_timesteps = len(timesteps)
        guided_steps = find_guided_steps(self.scheduler, timesteps, guidance_interval)
        if self.do_classifier_free_guidance and len(set(guided_steps)) > 1:
            self.transformer.check_cache_can_restart()
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 4. Prepare noise.
        batch_size = count * num_videos_per_prompt
        latents = self.prepare_latents(batch_size, generator, latents, device)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # schedulers for flow matching have none

        # 5. Prepare the streams: both start from noise at once, or each from its conditioning at a separate step.
        conditioning, noise = None, latents
        solvers, start_steps, solver_sizes, model_timesteps = [self.scheduler], (0,), (sum(sizes),), timesteps
        if clean is not None:
            clean = clean.repeat_interleave(num_videos_per_prompt, dim=0)
            strengths = (
                1.0 if structure is None else structure_strength,
                1.0 if dynamics is None else dynamics_strength,
            )
            start_steps, solver_sizes = get_start_steps(self.scheduler, len(timesteps), strengths), sizes
            shapes = self.transformer.structure_shape, self.transformer.dynamics_shape
            keep = get_keep_mask(kept_frames, *shapes, device, frames_per_position(self.vae))
            conditioning = StreamConditioning(clean, start_steps, sizes, keep)
            model_timesteps = get_stream_timesteps(timesteps, start_steps)
            # Solvers depend on their previous steps, which differ where one stream starts later.
            solvers = [self.scheduler, copy.deepcopy(self.scheduler)]
        modulations = self.prepare_modulations(model_timesteps, labels)
        model_timesteps = model_timesteps.to(device)
        if conditioning is not None:
            latents = conditioning.initialize(self.scheduler, model_timesteps, noise)

        # 6. Denoising loop. No step waits for a GPU: schedulers count on the CPU.
        estimate = None  # of the clean latents, for self-conditioning
        cached_rows = None  # batch size of the activations in the transformer's cache
        dtype = self.transformer.dtype
        if image_latents is not None:
            image_latents = image_latents.repeat_interleave(num_videos_per_prompt, dim=0).to(dtype)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                if conditioning is not None:
                    latents = conditioning.restore_kept(self.scheduler, model_timesteps[i], latents, noise)

                # 6.1 Expand the batch for classifier-free guidance: first the classes, then "no class".
                do_guidance = guided_steps[i] and self.do_classifier_free_guidance
                copies = 2 if do_guidance else 1
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, t)
                timestep = model_timesteps[i].expand(batch_size, *model_timesteps.shape[1:])
                model_labels = torch.cat([labels, torch.full_like(labels, null_class)]) if do_guidance else labels
                self_condition = None if estimate is None else torch.cat([estimate] * copies).to(dtype)
                rows = copies * batch_size
                if rows != cached_rows:  # caches hold activations of another batch size
                    if cached_rows is not None:
                        self.transformer.check_cache_can_restart()
                    self.transformer._reset_stateful_cache()
                    cached_rows = rows

                # 6.2 Predict, and apply guidance.
                with self.transformer.cache_context("cond_uncond"):
                    prediction = self.transformer(
                        torch.cat([model_input] * copies).to(dtype),
                        torch.cat([timestep] * copies),
                        model_labels,
                        self_condition,
                        modulations=None if modulations is None else [layer[i, :rows] for layer in modulations],
                        image_latents=None if image_latents is None else torch.cat([image_latents] * copies),
                        return_dict=False,
                    )[0]
                if do_guidance:
                    prediction = apply_guidance(prediction, self.guidance_scale, sizes)
                prediction = prediction.to(latents.dtype)

                # 6.3 Estimate the clean latents for self-conditioning.
                if self.transformer.config.self_conditioning:
                    levels = timestep if conditioning is None else spread_streams(timestep, sizes)
                    estimate = estimate_clean(self.scheduler, prediction, levels, model_input)

                # 6.4 Compute the previous noisy latents x_t -> x_t-1 of every stream that has started.
                streams = list(latents.split(solver_sizes, dim=1))
                for j, stream_prediction in enumerate(prediction.split(solver_sizes, dim=1)):
                    if i >= start_steps[j]:
                        # With a third axis, since some schedulers (thresholding) need more than batch and channel.
                        args = stream_prediction[..., None], t, streams[j][..., None]
                        streams[j] = solvers[j].step(*args, **extra_step_kwargs, return_dict=False)[0].squeeze(-1)
                latents = torch.cat(streams, dim=1)

                # 6.5 Call the callback.
                progress_bar.update()
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    outputs = callback_on_step_end(self, i, t, tensors)
                    if not isinstance(outputs, dict):
                        raise ValueError(
                            f"callback_on_step_end must return a dict of tensors, not {type(outputs).__name__}."
                        )
                    latents = outputs.pop("latents", latents)
        if conditioning is not None:
            latents = conditioning.restore_kept(self.scheduler, None, latents, noise)
        self._current_timestep = None

        # 7. Decode.
        frames = latents
        if self.vae is not None:
            frames = denormalize_latents(latents, self.autoencoder, *self.latent_statistics)
        if output_type == "latent":
            check_finite_output("the transformer", latents, self.transformer)
        else:
            clips = self.autoencoder.decode(frames.to(self.vae.dtype), return_dict=False)[0]
            if not clips.isfinite().all():  # a single wait for the device, unless an error has to be located
                check_finite_output("the transformer", latents, self.transformer)
                check_finite_output("the autoencoder", clips, self.vae)
            frames = self.video_processor.postprocess_video(clips, output_type=output_type)

        # 8. Offload all models.
        self.maybe_free_model_hooks()
        return VidTwinPipelineOutput(frames=frames) if return_dict else (frames,)
