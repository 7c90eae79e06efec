"""The pipeline that generates videos: noise -> DiT -> VidTwin decoder."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.video_processor import VideoProcessor
from huggingface_hub import ModelCard

# Diffusers loads a pipeline's components from modules that are already imported: these two must be, at run time.
from autoencoder.autoencoder_kl_vidtwin import AutoencoderKLVidTwin
from autoencoder.model_card import ModelCardMixin
from autoencoder.tiling import is_whole

from .classes import subclass_ids, superclass_name
from .conditioning import STREAMS, Given, given_latent
from .finite import check_finite_number, check_finite_output, check_finite_tensor
from .hub import download_pipeline
from .inputs import as_generators, as_labels, check_numbers, check_whole_numbers
from .lora import LoraPipelineMixin
from .model_card import pipeline_card
from .options import OptionsMixin
from .pipeline_output import VidTwinPipelineOutput
from .schedulers import (
    GivenStreams,
    check_generators,
    denoise,
    denormalize_latents,
    guidance_steps,
    guided,
    initial_noise,
    normalize_latents,
    retrieve_timesteps,
    stream_begins,
    stream_timesteps,
)
from .transformer_vidtwin import VidTwinTransformer3DModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VidTwinPipeline(ModelCardMixin, LoraPipelineMixin, OptionsMixin, DiffusionPipeline):
    """Video generation by class, or without one, over VidTwin's two latents.

    Args:
        vae: decodes latents to clips; its `latents_mean` and `latents_std` undo the normalization. With None the
            pipeline makes latents only (`output_type="latent"`), and they stay normalized.
        transformer: the denoiser, made for the autoencoder's latents.
        scheduler: any Diffusers scheduler whose `prediction_type` the transformer was trained for.
        id2label: class names by id; JSON makes the ids strings.

    Raises:
        ValueError: if the transformer was made for other latents, or a class id is out of its range.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        vae: AutoencoderKLVidTwin | None,
        transformer: VidTwinTransformer3DModel,
        scheduler: KarrasDiffusionSchedulers,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        for stream in ("structure", "dynamics") if vae is not None else ():
            latent, expected = getattr(vae, f"{stream}_shape"), getattr(transformer, f"{stream}_shape")
            if tuple(latent) != tuple(expected):
                raise ValueError(
                    f"The transformer was made for {stream} latents {tuple(expected)}, "
                    f"but the autoencoder's are {tuple(latent)}."
                )
        id2label = {int(k): v for k, v in (id2label or {}).items()}
        num_classes = transformer.config.num_classes or 0
        for label_id, label in id2label.items():
            if not 0 <= label_id < num_classes:
                raise ValueError(
                    f"id2label has {label!r} as {label_id}, but the transformer has {num_classes} classes."
                )
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label={str(k): v for k, v in id2label.items()})
        self.video_processor = VideoProcessor(do_resize=False)

    @classmethod
    def download(
        cls,
        pretrained_model_name: str,
        revision: str | None = None,
        variant: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool | None = None,
        force_download: bool = False,
        proxies: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> str:
        """Fetch a pipeline from the Hub into the cache, as `from_pretrained("user/name")` does.

        Only JSON and safetensors are fetched; code and pickles never are.

        Args:
            pretrained_model_name: "user/name".
            revision: branch, tag or commit; None: "main".
            variant: take weights of this name, such as "bf16" or "ema", where there are such.
            token: of a private or gated repository; None: that of `hf auth login`.
            cache_dir: None: that of `HF_HOME`.
            local_files_only: take what the cache has, and never connect.
            force_download: fetch what the cache has again.
            proxies: given on to huggingface_hub, which from 1.0 on obeys HTTPS_PROXY instead and says so.
            kwargs: what else `from_pretrained` was given; components among it are not fetched.

        Returns:
            The folder in the cache.

        Raises:
            ValueError: if the repository is of another pipeline, names a class that is neither Diffusers' nor ours,
                or something else than safetensors or code from the Hub is asked for.
            OSError: if the repository, the revision or a file in it does not exist, or cannot be had.
        """
        unsafe = [name for name in ("custom_pipeline", "trust_remote_code", "use_onnx") if kwargs.get(name)]
        if kwargs.get("use_safetensors") is False:
            unsafe.append("use_safetensors=False")
        if unsafe:
            raise ValueError(
                f"{cls.__name__} takes only JSON and safetensors from the Hub: leave out {' and '.join(unsafe)}."
            )
        options = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        if proxies is not None:
            options["proxies"] = proxies
        names, _ = cls._get_signature_keys(cls)
        return download_pipeline(
            cls,
            pretrained_model_name,
            revision,
            variant,
            passed=[name for name in names if name in kwargs],
            local_files_only=bool(local_files_only),
            **options,
        )

    def model_card(self, repo_id: str) -> ModelCard:
        """What `push_to_hub` writes as README.md, unless the repository has one with a text.

        Args:
            repo_id: "user/name", which the card's script loads.
        """
        return pipeline_card(self, repo_id)

    @property
    def labels(self) -> dict[str, int]:
        """Class ids by name, without `subclasses`."""
        named = self._ids_by_name
        return {name: label for name, label in named.items() if superclass_name(name) not in named}

    @property
    def subclasses(self) -> dict[str, int]:
        """Ids by name of the classes that are kinds of another, such as `jump/dog` of `jump`."""
        labels = self.labels
        return {name: label for name, label in self._ids_by_name.items() if name not in labels}

    @property
    def class_ids(self) -> list[int]:
        """The ids of all classes but sub-classes; none of an unconditional model."""
        below = set(self.subclasses.values())
        return [label for label in range(self.transformer.config.num_classes or 0) if label not in below]

    @property
    def _ids_by_name(self) -> dict[str, int]:
        return dict(sorted((name, int(label)) for label, name in self.config.id2label.items()))

    def get_label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """Class ids of names and ids.

        Raises:
            ValueError: if a name is unknown (tells the nearest known one), an id out of range or no whole number, or
                the list empty.
        """
        class_labels = as_labels(class_labels)
        if not class_labels:
            raise ValueError("class_labels is empty: name at least one class, or leave it out for none.")
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        num_classes = self.transformer.config.num_classes
        if num_classes is None:
            raise ValueError(f"This model is unconditional: it knows no class {label!r}; leave the class out.")
        if not isinstance(label, str):
            label = label.item() if isinstance(label, torch.Tensor) and label.ndim == 0 else label
            if not is_whole(label):
                raise ValueError(f"A class is given by its name or its whole number, not by {label!r}.")
            if not 0 <= int(label) < num_classes:
                raise ValueError(f"Class {label} is out of range: this model has classes 0 to {num_classes - 1}.")
            return int(label)
        labels = self._ids_by_name
        if label in labels:
            return labels[label]
        if not labels:
            raise ValueError(f"Unknown class {label!r}: this pipeline has no id2label; use 0 to {num_classes - 1}.")
        by_lower_case = {name.lower(): name for name in labels}
        nearest = by_lower_case[difflib.get_close_matches(label.lower(), by_lower_case, n=1, cutoff=0.0)[0]]
        more = f" and `subclasses` {len(self.subclasses)} more" if self.subclasses else ""
        listed = f"`labels` lists all {len(self.labels)}{more}"
        raise ValueError(f"Unknown class {label!r}; did you mean {nearest!r}? {listed}.")

    def draw_subclasses(
        self, label_ids: Sequence[int], generator: torch.Generator | list[torch.Generator] | None = None
    ) -> list[int]:
        """One of its sub-classes at random for each class that has some; others stay as they are.

        Args:
            label_ids: one for each video.
            generator: one for all videos, or a list with one for each.

        Raises:
            ValueError: if a list of generators has another length.
        """
        check_generators(generator, len(label_ids))
        below = subclass_ids(self._ids_by_name)
        drawn = []
        for i, label in enumerate(label_ids):
            if label in below:
                source = generator[i] if isinstance(generator, list) else generator
                place = torch.rand((), generator=source, device=None if source is None else source.device)
                label = below[label][int(place * len(below[label]))]
            drawn.append(label)
        return drawn

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
        strengths: tuple[float, float],
        kept_frames: Sequence[int],
        dynamics_given: bool,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a ValueError for values out of range."""
        for name, value in {
            "num_videos_per_prompt": num_videos_per_prompt,
            "num_inference_steps": num_inference_steps,
        }.items():
            if not 1 <= value < math.inf:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        check_finite_number("guidance_scale", guidance_scale)
        for name, schedule in {"timesteps": timesteps, "sigmas": sigmas}.items():
            if schedule is not None:
                check_finite_number(name, list(schedule))
        if isinstance(guidance_scale, tuple | list) and len(guidance_scale) != 2:
            raise ValueError(f"guidance_scale must be a number, or (structure's, dynamics'), not {guidance_scale}.")
        for stream, strength in zip(STREAMS, strengths, strict=True):
            if not 0 <= strength <= 1:
                raise ValueError(f"{stream}_strength must be between 0 (kept) and 1 (made anew), not {strength}.")
        if kept_frames and not dynamics_given:
            raise ValueError("kept_frames are of dynamics: give some.")
        frames = self.transformer.dynamics_shape[1]
        if not all(0 <= frame < frames for frame in kept_frames):
            raise ValueError(f"kept_frames must be of 0 to {frames - 1}, not {list(kept_frames)}.")
        if (
            not isinstance(guidance_interval, tuple | list)
            or len(guidance_interval) != 2
            or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                "guidance_interval must be (lower, upper) with 0 <= lower <= upper <= 1, where 0 is clean and 1 pure "
                f"noise, not {guidance_interval}."
            )
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {eta}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")
        if self.vae is None and output_type != "latent":
            raise ValueError(f'Without a vae output_type must be "latent", not {output_type!r}.')
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs may hold {self._callback_tensor_inputs}, not {sorted(unknown)}."
            )

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Standard normal noise (B, L) in float32, or the caller's.

        Raises:
            ValueError: if the caller's has another shape or is not finite, or there are not as many generators as
                videos.
        """
        shape = (batch_size, self.transformer.latent_size)
        noise = initial_noise(shape, generator, device) if latents is None else latents
        if tuple(noise.shape) != shape:
            raise ValueError(f"latents must be (B, L) = {shape}, but have shape {tuple(noise.shape)}.")
        if latents is not None:
            check_finite_tensor("latents", latents)
        return noise.to(device, torch.float32)

    def prepare_given(
        self, given: dict[str, Given], num_labels: int, device: torch.device
    ) -> tuple[torch.Tensor | None, int]:
        """Normalised latents (N, L) of the streams that are given, zero for others, and the number N of videos.

        One latent serves for several labels, and one label for several latents.

        Args:
            given: by stream.
            num_labels: classes asked for.

        Raises:
            ValueError: if there is no autoencoder, or what is given does not fit it or is neither one nor N.
        """
        if not given:
            return None, num_labels
        if self.vae is None:
            raise ValueError(f"Without a vae no {' and no '.join(given)} can be given.")
        sizes = self._stream_sizes
        streams = {name: given_latent(value, name, self.vae, device) for name, value in given.items()}
        counts = {"class_labels": num_labels, **{name: len(latent) for name, latent in streams.items()}}
        count = max(counts.values())
        for name, number in counts.items():
            if number not in (1, count):
                raise ValueError(f"{name} are {number}, but there are to be {count} videos: give one, or {count}.")
        parts = [
            streams[name].expand(count, -1) if name in streams else torch.zeros(count, size, device=device)
            for name, size in zip(STREAMS, sizes, strict=True)
        ]
        return normalize_latents(torch.cat(parts, dim=1), self.vae), count

    def _known_values(self, kept_frames: Sequence[int], device: torch.device) -> torch.Tensor | None:
        """Packed latents' values (L,) that are the dynamics of these frames."""
        if not kept_frames:
            return None
        structure = torch.zeros(self._stream_sizes[0], dtype=torch.bool, device=device)
        dynamics = torch.zeros(self.transformer.dynamics_shape, dtype=torch.bool, device=device)
        dynamics[:, list(kept_frames)] = True
        return torch.cat([structure, dynamics.flatten()])

    @property
    def _stream_sizes(self) -> tuple[int, int]:
        shapes = (self.transformer.structure_shape, self.transformer.dynamics_shape)
        return tuple(math.prod(shape) for shape in shapes)

    def _kept_modulations(self, timesteps: torch.Tensor, labels: torch.Tensor | None) -> list[torch.Tensor] | None:
        """`transformer.modulations` of all steps, (steps, 2 B, 2, ...) each: B rows of the classes, then B of none.

        Without labels there is one row. None where they would take more memory than the weights that need not be read
        again, or where those are offloaded.
        """
        device, transformer = self._execution_device, self.transformer
        if labels is not None:  # guidance may come and go
            labels = torch.cat([labels, torch.full_like(labels, transformer.config.num_classes)])
        rows = 1 if labels is None else len(labels)
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        offloaded = transformer.device != device or _is_group_offload_enabled(transformer)
        if offloaded or 2 * rows * len(timesteps) > width:
            return None
        shown = timesteps.to(device).repeat_interleave(rows, dim=0)
        of_all = None if labels is None else labels.repeat(len(timesteps))
        return [layer.unflatten(0, (-1, rows)) for layer in transformer.modulations(shown, of_all)]

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
        structure: Given | None = None,
        dynamics: Given | None = None,
        structure_strength: float = 0.0,
        dynamics_strength: float = 0.0,
        kept_frames: Sequence[int] = (),
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
        """Generate videos, from noise alone or around streams that are given.

        With a `structure` the model makes the dynamics for it (animate), with `dynamics` the structure (retarget); a
        strength above 0 lets it change what is given (vary). It takes a model that was trained with a timestep for
        each stream (`diffusion.independent_timesteps`).

        Args:
            class_labels: ids or names, one video each (see `labels` and `subclasses`); None: one video of no class.
                A class that has sub-classes gives each video one of them, drawn by `generator`, all as often; where a
                stream is given it is itself.
            num_videos_per_prompt: videos per class, standing together in the result.
            guidance_scale: classifier-free guidance where above 1; the paper's is 5. Or one for structure and one for
                dynamics, which steer content and motion apart.
            num_inference_steps: denoising steps.
            timesteps, sigmas: a custom schedule instead, for schedulers that take one.
            eta: DDIM's share of noise, 0 to 1.
            guidance_interval: noise levels (lower, upper] at which guidance acts, as shares of the training timesteps:
                0 is clean, 1 pure noise. Steps outside cost half (Kynkäänniemi et al., arXiv 2404.07724).
            structure, dynamics: to keep or to vary: clips, still images or latents, one or as many as classes; see
                `given_latent`.
            structure_strength, dynamics_strength: how much of what is given the model makes anew, as a share of the
                steps: 0 keeps it, 1 leaves no trace of it.
            kept_frames: frames whose `dynamics` are kept, whatever its strength; the others are made to fit.
            generator: one for all videos, or a list with one for each.
            latents: standard normal noise (B, L) to start from.
            output_type: "pil", "np", "pt" or "latent"; see `VidTwinPipelineOutput`.
            return_dict: whether to return a `VidTwinPipelineOutput` or a tuple.
            callback_on_step_end: (pipeline, step, timestep, tensors by name) -> dict of tensors to go on with.
            callback_on_step_end_tensor_inputs: which tensors it is given; only "latents" there is.

        Raises:
            ValueError: for an unknown class, an id out of range, a shape or value that does not fit or is not finite,
                or a guidance interval where the scheduler or the cache can have none.
            NonFiniteError: a ValueError, if the transformer or the autoencoder produces NaN or infinite values. Its
                message names the dtype in which that happened, and one to use instead.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        generator = as_generators(generator)
        check_whole_numbers(
            num_videos_per_prompt=num_videos_per_prompt,
            num_inference_steps=num_inference_steps,
            kept_frames=kept_frames,
        )
        check_numbers(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            structure_strength=structure_strength,
            dynamics_strength=dynamics_strength,
            eta=eta,
        )
        self.check_inputs(
            num_videos_per_prompt,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            guidance_interval,
            (structure_strength, dynamics_strength),
            kept_frames,
            dynamics is not None,
            eta,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        null_class = self.transformer.config.num_classes
        self._guidance_scale = tuple(guidance_scale) if isinstance(guidance_scale, list) else guidance_scale
        self._has_class = class_labels is not None
        self._interrupt = False
        self._current_timestep = None
        device = self._execution_device

        # 1. Classes and given streams
        label_ids = [null_class] if class_labels is None else self.get_label_ids(class_labels)
        named = {name: value for name, value in zip(STREAMS, (structure, dynamics), strict=True) if value is not None}
        clean, count = self.prepare_given(named, len(label_ids), device)
        batch_size = count * num_videos_per_prompt
        labels = None
        if null_class is not None:
            label_ids = label_ids * count if len(label_ids) == 1 else label_ids
            label_ids = [label for label in label_ids for _ in range(num_videos_per_prompt)]
            if clean is None:
                label_ids = self.draw_subclasses(label_ids, generator)
            labels = torch.tensor(label_ids, device=device)

        # 2. Noise and timesteps
        latents = self.prepare_latents(batch_size, generator, latents, device)
        timesteps = retrieve_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        self._num_timesteps = len(timesteps)
        shown, given = timesteps, None
        if clean is not None:
            strengths = (
                1.0 if structure is None else structure_strength,
                1.0 if dynamics is None else dynamics_strength,
            )
            begins = stream_begins(self.scheduler, len(timesteps), strengths)
            clean = clean.repeat_interleave(num_videos_per_prompt, dim=0)
            given = GivenStreams(clean, begins, self._stream_sizes, self._known_values(kept_frames, device))
            shown = stream_timesteps(timesteps, begins)
        guides = guidance_steps(self.scheduler, timesteps, guidance_interval)
        if self.do_classifier_free_guidance and len(set(guides)) > 1:
            self.transformer.check_cache_can_restart()

        # 3. Denoising
        kept = self._kept_modulations(shown, labels)
        step, rows = -1, None  # of the last batch

        def predict(latents, timestep, class_labels, self_condition):
            nonlocal rows
            if len(latents) != rows:  # what a cache kept is of another batch
                if rows is not None:
                    self.transformer.check_cache_can_restart()
                self.transformer._reset_stateful_cache()
                rows = len(latents)
            dtype = self.transformer.dtype
            if self_condition is not None:
                self_condition = self_condition.to(dtype)
            modulations = None if kept is None else [layer[step, :rows] for layer in kept]
            options = {"modulations": modulations, "return_dict": False}
            with self.transformer.cache_context("cond_uncond"):
                return self.transformer(latents.to(dtype), timestep, class_labels, self_condition, **options)[0]

        def model_fn(latents, timestep, estimate):
            nonlocal step
            step += 1
            self._current_timestep = timesteps[step]
            scale = self.guidance_scale if guides[step] and self.do_classifier_free_guidance else 1.0
            return guided(predict, latents, timestep, labels, null_class, scale, estimate, self._stream_sizes)

        def callback(i, t, latents):
            progress_bar.update()
            if callback_on_step_end is None:
                return latents
            tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
            outputs = callback_on_step_end(self, i, t, tensors)
            if not isinstance(outputs, dict):
                raise ValueError(f"callback_on_step_end must return a dict of tensors, not {type(outputs).__name__}.")
            return outputs.pop("latents", latents)

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            latents = denoise(
                model_fn,
                self.scheduler,
                latents,
                timesteps,
                generator=generator,
                eta=eta,
                self_conditioning=self.transformer.config.self_conditioning,
                given=given,
                callback=callback,
                interrupted=lambda: self.interrupt,
            )
        self._current_timestep = None

        # 4. Decoding
        frames = latents if self.vae is None else denormalize_latents(latents, self.vae)
        if output_type == "latent":
            check_finite_output("the transformer", latents, self.transformer)
        else:
            clips = self.vae.decode(frames.to(self.vae.dtype), return_dict=False)[0]
            if not clips.isfinite().all():  # one look at the device's values; where they went wrong is asked only then
                check_finite_output("the transformer", latents, self.transformer)
                check_finite_output("the autoencoder", clips, self.vae)
            frames = self.video_processor.postprocess_video(clips, output_type=output_type)

        self.maybe_free_model_hooks()
        return VidTwinPipelineOutput(frames=frames) if return_dict else (frames,)
