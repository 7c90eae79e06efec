"""Packed latents (B, L) in the units of the DiT, structure first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from autoencoder.autoencoder_kl_vidtwin import AutoencoderKLVidTwin

STREAMS = ("structure", "dynamics")


def spread_streams(values: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """Expand a value per clip (B,) to (B, 1), or a value per stream (B, 2) to packed latents (B, L).

    Args:
        values: (B,) or (B, 2).
        sizes: number of values in the structure and in the dynamics latent, L in total.
    """
    if values.ndim == 1:
        return values[:, None]
    return torch.cat([values[:, i : i + 1].expand(-1, size) for i, size in enumerate(sizes)], dim=1)


def frames_per_position(vae: AutoencoderKLVidTwin | None) -> int:
    """Return the frames that share a position in time of the dynamics latent; 1 without dynamics or autoencoder."""
    return vae.clip_shape[1] // vae.dynamics_shape[1] if vae is not None and vae.has_dynamics else 1


def normalize_latents(latents: torch.Tensor, vae: AutoencoderKLVidTwin) -> torch.Tensor:
    """Normalize packed latents (B, L) of the autoencoder to zero mean and unit deviation per stream.

    The statistics are `latents_mean` and `latents_std` of the autoencoder's config, [structure, dynamics] each;
    without them latents are returned unchanged.
    """
    if vae.config.latents_mean is None:
        return latents
    return (latents - expand_statistic("latents_mean", vae, latents)) / expand_statistic("latents_std", vae, latents)


def denormalize_latents(latents: torch.Tensor, vae: AutoencoderKLVidTwin) -> torch.Tensor:
    """Invert `normalize_latents`: (B, L) ready for `vae.decode`."""
    if vae.config.latents_mean is None:
        return latents
    return latents * expand_statistic("latents_std", vae, latents) + expand_statistic("latents_mean", vae, latents)


def expand_statistic(name: str, vae: AutoencoderKLVidTwin, like: torch.Tensor) -> torch.Tensor:
    sizes = (math.prod(vae.structure_shape), math.prod(vae.dynamics_shape))
    return torch.cat([like.new_full((size,), value) for size, value in zip(sizes, vae.config[name], strict=True)])
