"""Packed latents (B, L) in the units of the DiT, structure first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from autoencoder.video_autoencoder import VideoAutoencoder

STREAMS = ("structure", "dynamics")


def spread_streams(values: torch.Tensor, sizes: tuple[int, int], channels: int = 1) -> torch.Tensor:
    """Expand a value per clip (B,) to (B, 1), or a value per stream (B, 2) or row (B, 1 + R) to packed latents (B, L).

    Args:
        values: (B,), (B, 2), or (B, 1 + R) with one for structure and one for each of R rows of dynamics frames.
        sizes: number of values in the structure and in the dynamics latent, L in total.
        channels: of the dynamics latent, for values per row: its frames are packed channel by channel.
    """
    if values.ndim == 1:
        return values[:, None]
    if values.shape[1] == 2:
        return torch.cat([values[:, i : i + 1].expand(-1, size) for i, size in enumerate(sizes)], dim=1)
    rows = values.shape[1] - 1
    dynamics = values[:, None, 1:, None].expand(-1, channels, -1, sizes[1] // (channels * rows))
    return torch.cat([values[:, :1].expand(-1, sizes[0]), dynamics.flatten(1)], dim=1)


def split_stages(
    latents: torch.Tensor, image: torch.Tensor, deviation: float, has_image: torch.Tensor | None = None
) -> torch.Tensor:
    """The latents (B, L) that a transformer with `image_residual` models in its stages.

    With an image the structure latent is replaced by its difference from that of the image, divided by `deviation`.
    Without one, the latents are those of a still: the structure latent of the image, and zeros as dynamics latent.

    Args:
        latents: of clips (B, L), normalized.
        image: structure latents of their first frames (B, L_S), normalized.
        deviation: `image_residual`.
        has_image: (B,) bool; None: all.
    """
    structure, dynamics = latents.tensor_split([image.shape[1]], dim=1)
    motion = torch.cat([(structure - image) / deviation, dynamics], dim=1)
    if has_image is None:
        return motion
    return torch.where(has_image[:, None], motion, F.pad(image, (0, dynamics.shape[1])))


def join_stages(latents: torch.Tensor, image: torch.Tensor, deviation: float) -> torch.Tensor:
    """Invert `split_stages` for clips with an image."""
    structure, dynamics = latents.tensor_split([image.shape[1]], dim=1)
    return torch.cat([deviation * structure + image, dynamics], dim=1)


def frames_per_position(vae: VideoAutoencoder | None) -> int:
    """Return the frames that share a position in time of the dynamics latent; 1 without dynamics or autoencoder."""
    return vae.clip_shape[1] // vae.dynamics_shape[1] if vae is not None and vae.has_dynamics else 1


def normalize_latents(
    latents: torch.Tensor,
    vae: VideoAutoencoder,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> torch.Tensor:
    """Normalize packed latents (B, L) of the autoencoder to zero mean, by default to unit deviation, per part.

    Args:
        latents: packed (B, L).
        vae: the autoencoder.
        mean, std: statistics of parts, as in `expand_statistic`; None: those that the autoencoder states. Without
            any, latents are returned unchanged.
    """
    mean, std = (vae.latents_mean, vae.latents_std) if mean is None else (mean, std)
    if mean is None:
        return latents
    return (latents - expand_statistic(mean, vae, latents)) / expand_statistic(std, vae, latents)


def denormalize_latents(
    latents: torch.Tensor,
    vae: VideoAutoencoder,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> torch.Tensor:
    """Invert `normalize_latents`: (B, L) ready for `vae.decode`."""
    mean, std = (vae.latents_mean, vae.latents_std) if mean is None else (mean, std)
    if mean is None:
        return latents
    return latents * expand_statistic(std, vae, latents) + expand_statistic(mean, vae, latents)


def expand_statistic(values: list[float], vae: VideoAutoencoder, like: torch.Tensor) -> torch.Tensor:
    """Expand a statistic of each part of the latents to packed latents: (L,).

    Parts are streams, channels, or channels of each query of structure and channels of dynamics; structure first.

    Raises:
        ValueError: if the number of values is that of none of these.
    """
    shapes = structure, _ = vae.structure_shape, vae.dynamics_shape
    by_channel = [math.prod(shape[1:]) for shape in shapes for _ in range(shape[0])]
    by_query = [math.prod(structure[2:])] * math.prod(structure[:2]) + by_channel[structure[0] :]
    for sizes in (by_channel, [math.prod(shape) for shape in shapes], by_query):
        if len(values) == len(sizes):
            return torch.cat([like.new_full((size,), value) for size, value in zip(sizes, values, strict=True)])
    raise ValueError(
        f"latents_mean and latents_std have {len(values)} values, but the latents have {len(shapes)} streams, "
        f"{len(by_channel)} channels, and {len(by_query)} channels of queries."
    )
