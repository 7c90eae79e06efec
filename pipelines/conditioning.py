"""What a pipeline may be given to keep or to vary: clips, still images or latents, as one stream's latent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from autoencoder.latents import TwinLatents

from .finite import check_finite_output, check_finite_tensor

if TYPE_CHECKING:
    from autoencoder.autoencoder_kl_vidtwin import AutoencoderKLVidTwin

Given = TwinLatents | torch.Tensor | np.ndarray | PIL.Image.Image | list
STREAMS = ("structure", "dynamics")


def given_latent(given: Given, stream: str, vae: AutoencoderKLVidTwin, device: torch.device) -> torch.Tensor:
    """The latent of a stream, flat and not normalized, (B, values), float32.

    Args:
        given: `TwinLatents`; a latent of the stream (B, *its shape), as `vae.unpack` gives it; or clips or stills as
            the pipeline puts them out: a PIL image, a list of T of them or a list of such lists, a float array
            (B, T, H, W, 3) or tensor (B, T, 3, H, W) in [0, 1], either without B as well. One frame is a still, shown
            for the whole clip. Images are scaled and cut to the model's size.
        stream: "structure" or "dynamics".
        device: to encode on.

    Raises:
        ValueError: if it is none of these, of another size than the model's, or not finite.
        NonFiniteError: if its latent is not finite.
    """
    shape = tuple(getattr(vae, f"{stream}_shape"))
    if isinstance(given, TwinLatents):
        given = getattr(given, stream)
        if tuple(given.shape[1:]) != shape:
            raise ValueError(f"{stream} must be latents (B, {_sizes(shape)}), but they have shape {_of(given)}.")
    if isinstance(given, torch.Tensor) and tuple(given.shape[1:]) == shape:
        check_finite_tensor(stream, given)
        return given.detach().to(device, torch.float32).flatten(1)
    clips = _clips(given, stream, vae)
    latents = vae.encode(clips.to(device, vae.dtype)).latent_dist.mode()
    check_finite_output("the autoencoder", latents, vae)
    return getattr(vae.unpack(latents), stream).float().flatten(1)


def _clips(given: Given, stream: str, vae: AutoencoderKLVidTwin) -> torch.Tensor:
    """Clips (B, C, T, H, W) in [-1, 1]."""
    channels, frames, height, width = vae.clip_shape
    if isinstance(given, PIL.Image.Image):
        given = [given]
    if isinstance(given, list):
        clips = given if given and isinstance(given[0], list) else [given]
        if not all(clip and all(isinstance(frame, PIL.Image.Image) for frame in clip) for clip in clips):
            raise ValueError(f"{stream}: a list must hold PIL images, or lists of them, and at least one.")
        if len({len(clip) for clip in clips}) > 1:
            raise ValueError(f"{stream}: all clips must have as many frames, not {sorted({*map(len, clips)})}.")
        fitted = [[np.asarray(PIL.ImageOps.fit(f.convert("RGB"), (width, height))) for f in clip] for clip in clips]
        given = np.stack([np.stack(clip) for clip in fitted]).astype(np.float32) / 255
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given).movedim(-1, -3) if given.ndim >= 3 else torch.from_numpy(given)
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{stream} must be clips, images or latents, not {type(given).__name__}.")
    if not given.is_floating_point():
        raise ValueError(f"{stream}: frames must be floats in [0, 1], not {given.dtype}.")
    video = given if given.ndim == 5 else given[None]
    size, shape = tuple(video.shape[1:]), getattr(vae, f"{stream}_shape")
    if video.ndim != 5 or size not in ((frames, channels, height, width), (1, channels, height, width)):
        raise ValueError(
            f"{stream} must be clips of {frames} frames, or of one, of {height} x {width}, (B, T, {channels}, H, W), "
            f"or latents (B, {_sizes(shape)}), but has shape {_of(given)}."
        )
    check_finite_tensor(stream, video)
    if video.min() < 0 or video.max() > 1:
        raise ValueError(
            f"{stream}: frames must lie in [0, 1], but reach from {video.min():.3g} to {video.max():.3g}."
        )
    return video.expand(-1, frames, -1, -1, -1).transpose(1, 2) * 2 - 1


def _of(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _sizes(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
