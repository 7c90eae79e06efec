"""Conditioning: clips, images or latents as one stream, kept or varied while sampling."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import SchedulerMixin
from torch import nn

from autoencoder.latents import TwinLatents

from .finite import check_finite_output, check_finite_tensor
from .inputs import common_length
from .latents import STREAMS, normalize_latents, spread_streams
from .schedulers import noise_levels
from .stream_schedule import StreamSchedule

if TYPE_CHECKING:
    from autoencoder.video_autoencoder import VideoAutoencoder

    from .transformer_vidtwin import VidTwinTransformer3DModel

logger = logging.getLogger(__name__)
ConditioningInput = TwinLatents | torch.Tensor | np.ndarray | PIL.Image.Image | list


@dataclass(frozen=True)
class StreamConditioning:
    """Streams that start from conditioning latents instead of noise.

    Attributes:
        clean: conditioning latents, packed and normalized (B, L); arbitrary for a stream that starts at step 0.
        schedule: of the streams, from their strengths.
        sizes: number of values in the structure and in the dynamics latent, L in total.
        keep: mask (L,) of values that are kept while the rest of their stream is generated around them, as in RePaint
            (Lugmayr et al., arXiv 2201.09865); None: no value.
        channels: of the dynamics latent.
    """

    clean: torch.Tensor
    schedule: StreamSchedule
    sizes: tuple[int, int]
    keep: torch.Tensor | None = None
    channels: int = 1

    def initialize(self, scheduler: SchedulerMixin, noise: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """Return the initial latents (B, L): each stream is noise, noisy conditioning or clean conditioning.

        Args:
            scheduler: states the noise levels.
            noise: standard normal (B, L).
            temperature: factor on the noise of a stream that is noise; noisy conditioning has the noise of its level.
        """
        alpha, sigma = noise_levels(scheduler, self.schedule.model_timesteps()[0].to(noise.device))
        streams = []
        for i, (clean, stream_noise) in enumerate(
            zip(self.clean.split(self.sizes, 1), noise.split(self.sizes, 1), strict=True)
        ):
            wait = self.schedule.waits[i]
            if 0 < wait < len(self.schedule):
                streams.append(alpha[i] * clean + sigma[i] * stream_noise)
            else:
                streams.append(clean if wait else temperature * stream_noise)
        return torch.cat(streams, dim=1)

    def restore_kept(
        self, scheduler: SchedulerMixin, timestep: torch.Tensor | None, latents: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Overwrite kept values of latents (B, L) at the noise levels of a timestep (2,) or (1 + R,); None: clean."""
        if self.keep is None:
            return latents
        if timestep is None:
            return torch.where(self.keep, self.clean, latents)
        levels = noise_levels(scheduler, timestep[None])
        alpha, sigma = (spread_streams(level, self.sizes, self.channels) for level in levels)
        return torch.where(self.keep, alpha * self.clean + sigma * noise, latents)


def check_streams_can_wait(scheduler: SchedulerMixin) -> None:
    """Raise a `ValueError` if the scheduler scales its latents, so that a waiting stream seems to be less noisy."""
    if getattr(scheduler, "init_noise_sigma", 1.0) != 1:
        raise ValueError(
            f"{type(scheduler).__name__} does not support conditioning or structure_delay; use DDIM, DPM-Solver++, "
            "UniPC or flow matching."
        )


def warn_of_shared_timesteps(transformer: VidTwinTransformer3DModel, schedule: StreamSchedule) -> None:
    """Warn if the streams start at different steps, which a transformer was not trained for."""
    if transformer.config.independent_timesteps is False and len(set(schedule.waits)) > 1:
        logger.warning(
            "This transformer was trained with one timestep for both streams (diffusion.independent_timesteps=0), but "
            "here one stream is given or starts later: the generated stream may not match it."
        )


def get_keep_mask(
    kept_frames: Sequence[int],
    structure_shape: tuple[int, ...],
    dynamics_shape: tuple[int, ...],
    device: torch.device,
    frames_per_position: int = 1,
) -> torch.Tensor | None:
    """Return a mask (L,) over packed latents of the dynamics of some frames; None for no frames.

    Raises:
        ValueError: if some, but not all, of the `frames_per_position` frames of a position in time are kept.
    """
    if not kept_frames:
        return None
    positions = sorted({frame // frames_per_position for frame in kept_frames})
    if len(set(kept_frames)) != len(positions) * frames_per_position:
        raise ValueError(
            f"kept_frames must be whole groups of {frames_per_position} frames, from a multiple of "
            f"{frames_per_position} on, since they share a position of the dynamics latent, not {list(kept_frames)}."
        )
    structure = torch.zeros(structure_shape, dtype=torch.bool, device=device)
    dynamics = torch.zeros(dynamics_shape, dtype=torch.bool, device=device)
    dynamics[:, positions] = True
    return torch.cat([structure.flatten(), dynamics.flatten()])


def encode_conditioning(
    condition: ConditioningInput,
    stream: str,
    vae: VideoAutoencoder,
    device: torch.device,
    is_image: bool = False,
    name: str | None = None,
) -> torch.Tensor:
    """Encode the conditioning input of one stream to latents (B, values), float32, not normalized.

    Args:
        condition: `TwinLatents`; a latent of the stream (B, *shape), as `vae.unpack` returns it; or clips or images:
            a PIL image, a list of T of them or a list of such lists, a float array (B, T, H, W, 3) or tensor
            (B, T, 3, H, W) in [0, 1], either without B as well. A single frame is repeated for the whole clip. PIL
            images are resized and center-cropped to the model's size.
        stream: "structure" or "dynamics".
        vae: the autoencoder.
        device: to encode on.
        is_image: of clips, use the first frame only.
        name: of the argument, for error messages; None: that of the stream.

    Raises:
        ValueError: if the type, the size or a value of the input is not supported.
        NonFiniteError: if its latent is not finite.
    """
    name = name or stream
    shape = tuple(getattr(vae, f"{stream}_shape"))
    if isinstance(condition, TwinLatents):
        condition = getattr(condition, stream)
        if tuple(condition.shape[1:]) != shape:
            raise ValueError(
                f"{name} latents must be (B, {', '.join(map(str, shape))}), but have shape {tuple(condition.shape)}."
            )
    if isinstance(condition, torch.Tensor) and tuple(condition.shape[1:]) == shape:
        check_finite_tensor(name, condition)
        return condition.detach().to(device, torch.float32).flatten(1)
    clips = prepare_clips(condition, stream, vae, name)
    clips = clips[:, :, :1].expand_as(clips) if is_image else clips
    latents = vae.encode(clips.to(device, vae.dtype)).latent_dist.mode()
    check_finite_output("the autoencoder", latents, vae)
    return getattr(vae.unpack(latents), stream).float().flatten(1)


def decode_first_frames(condition: ConditioningInput, vae: VideoAutoencoder) -> ConditioningInput:
    """First frames of the given structure: latents are decoded, (B, 1, 3, H, W) in [0, 1]; clips are unchanged."""
    if isinstance(condition, TwinLatents):
        condition = condition.structure
    if not is_structure_latent(condition, vae):
        return condition
    dynamics = condition.new_zeros(len(condition), *vae.dynamics_shape)
    latents = TwinLatents(condition, dynamics).pack().to(vae.device, vae.dtype)
    clips = vae.decode(latents, components="structure" if vae.has_dynamics else "both").sample
    return (clips[:, :, :1].transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)


def get_first_frames(condition: ConditioningInput, vae: VideoAutoencoder, name: str) -> torch.Tensor | None:
    """First frames of images or clips, (B, C, H, W) in [-1, 1]; None for latents."""
    if isinstance(condition, TwinLatents) or is_structure_latent(condition, vae):
        return None
    return prepare_clips(condition, "structure", vae, name)[:, :, 0]


def is_structure_latent(condition: ConditioningInput, vae: VideoAutoencoder) -> bool:
    """Whether an input is a structure latent (B, *structure_shape)."""
    return isinstance(condition, torch.Tensor) and tuple(condition.shape[1:]) == tuple(vae.structure_shape)


def prepare_clips(condition: ConditioningInput, stream: str, vae: VideoAutoencoder, name: str) -> torch.Tensor:
    """Convert images, arrays or tensors to clips (B, C, T, H, W) in [-1, 1]; see `encode_conditioning`."""
    channels, frames, height, width = vae.clip_shape

    # Convert everything to a tensor (..., C, H, W) in [0, 1].
    if isinstance(condition, PIL.Image.Image):
        condition = [condition]
    if isinstance(condition, list):
        clips = condition if condition and isinstance(condition[0], list) else [condition]
        if not all(clip and all(isinstance(frame, PIL.Image.Image) for frame in clip) for clip in clips):
            raise ValueError(f"{name}: a list must hold PIL images, or non-empty lists of PIL images.")
        if len({len(clip) for clip in clips}) > 1:
            raise ValueError(f"{name}: all clips must have the same length, not {sorted({*map(len, clips)})} frames.")
        fitted = [[np.asarray(PIL.ImageOps.fit(f.convert("RGB"), (width, height))) for f in clip] for clip in clips]
        condition = np.stack([np.stack(clip) for clip in fitted]).astype(np.float32) / 255
    if isinstance(condition, np.ndarray):
        condition = torch.from_numpy(condition)
        condition = condition.movedim(-1, -3) if condition.ndim >= 3 else condition

    # Check the tensor.
    if not isinstance(condition, torch.Tensor):
        raise ValueError(f"{name} must be clips, images or latents, not {type(condition).__name__}.")
    if not condition.is_floating_point():
        raise ValueError(f"{name}: frames must be floats in [0, 1], not {condition.dtype}.")
    video = condition if condition.ndim == 5 else condition[None]
    if video.ndim != 5 or video.shape[1] not in (1, frames) or video.shape[2:] != (channels, height, width):
        shape = ", ".join(map(str, getattr(vae, f"{stream}_shape")))
        raise ValueError(
            f"{name} must be clips (B, T, {channels}, {height}, {width}) of T = {frames} frames or one frame, or "
            f"latents (B, {shape}), but has shape {tuple(condition.shape)}."
        )
    check_finite_tensor(name, video)
    if video.min() < 0 or video.max() > 1:
        raise ValueError(f"{name}: frames must be in [0, 1], not in [{video.min():.3g}, {video.max():.3g}].")
    return video.expand(-1, frames, -1, -1, -1).transpose(1, 2) * 2 - 1


class ConditioningMixin:
    """Conditioning inputs of a pipeline, and the statistics that normalize their latents."""

    autoencoder: VideoAutoencoder | None
    config: Any
    transformer: Any
    vae: nn.Module | None

    @property
    def latent_statistics(self) -> tuple[list[float] | None, list[float] | None]:
        """Mean and standard deviation of the latents: those of this pipeline's config, else of the autoencoder."""
        if self.config.latents_mean is not None:
            return self.config.latents_mean, self.config.latents_std
        return self.autoencoder.latents_mean, self.autoencoder.latents_std

    @property
    def _stream_sizes(self) -> tuple[int, int]:
        return math.prod(self.transformer.structure_shape), math.prod(self.transformer.dynamics_shape)

    def prepare_conditioning(
        self, conditions: dict[str, ConditioningInput], counts: dict[str, int], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
        """Encode conditioning inputs to normalized latents; one input, label or prompt serves all N videos.

        Args:
            conditions: inputs by name: `structure`, `dynamics`, `image`.
            counts: numbers of class labels and of prompts, by name.
            device: to encode on.

        Returns:
            The latents of the streams (N, L), where a stream without an input is arbitrary, or None without such
            inputs; the structure latents of the images (N, L_S), or None; and the number N of videos.

        Raises:
            ValueError: if there is no autoencoder, or an input does not fit it or is neither one nor N.
        """
        if not conditions:
            return None, None, common_length(counts)
        if self.vae is None:
            raise ValueError(f"{' and '.join(conditions)}: conditioning requires a vae, but this pipeline has none.")
        if "image" in conditions and self.transformer.image_embed is None:
            # The structure of an autoencoder with one latent holds the whole clip, so it would only repeat the image.
            has_dynamics = self.autoencoder.has_dynamics
            remedy = "pass structure instead" if has_dynamics else "train one that has it"
            raise ValueError(f"image: this pipeline's transformer has no image_conditioning; {remedy}.")
        if "dynamics" in conditions and not self.autoencoder.has_dynamics:
            raise ValueError("dynamics: this pipeline's autoencoder has no dynamics latent; pass structure instead.")
        vae, encoded = self.autoencoder, {}
        if self.transformer.config.image_residual and "structure" in conditions:
            conditions = {"image": decode_first_frames(conditions["structure"], vae)} | conditions
        for name, value in conditions.items():
            stream, is_image = ("structure", True) if name == "image" else (name, False)
            encoded[name] = encode_conditioning(value, stream, vae, device, is_image, name)
        count = common_length({**counts, **{name: len(latents) for name, latents in encoded.items()}})

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
