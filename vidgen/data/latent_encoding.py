"""Encode the clips of a data set with a VAE, and compute the mean and standard deviation of the latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from autoencoder import TwinLatents, TwinPosterior
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines.finite import non_finite_message

from ..common.errors import UserError
from ..common.progress import progress
from .dataset import ClipDataset, collate_clips


def split_evenly(indices: range, size: int) -> list[range]:
    """Consecutive ranges of `size` indices; the last may be shorter."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@torch.no_grad()
def encode_clips(
    vae: VideoAutoencoder,
    clips: ClipDataset,
    device: torch.device | str,
    batches: Sequence[Sequence[int]],
    num_workers: int = 0,
    flips: bool = False,
    images: bool = False,
) -> Iterator[tuple[TwinPosterior, dict[str, Any]]]:
    """Yield the posterior, over (b, L), float32, on the CPU, of each batch of clip indices, with the batch.

    With `flips` every clip is also encoded flipped: the posterior is over (2 b, L), the flipped clips last. With
    `images` the batch also has `image`, the packed structure latents (b or 2 b, L_S) of the first frames as still
    clips. Raises `UserError` if the latents of a clip are not finite.
    """
    loader = DataLoader(
        clips,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_clips,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # by default a loader draws from the global generator, which training uses
    )
    for batch in progress(loader, "encoding"):
        video = batch["video"].to(device, vae.dtype, non_blocking=True)
        if flips:
            video = torch.cat([video, video.flip(-1)])
        encoded = vae.encode(video).latent_dist
        posterior = TwinPosterior(encoded.mean.float().cpu(), encoded.logvar.float().cpu())
        if not (posterior.mean.isfinite().all() and posterior.logvar.isfinite().all()):
            message = non_finite_message("the autoencoder", vae)
            raise UserError(f"{message} (train.mixed_precision) The clips are of {', '.join(batch['path'])}.")
        if images:
            still = vae.encode(video[:, :, :1].expand_as(video)).latent_dist.mode()
            batch["image"] = vae.unpack(still).structure.flatten(1).float().cpu()
        yield posterior, batch


def split_latents(latents: TwinLatents, by: str) -> list[torch.Tensor]:
    """Views of the parts of latents for which statistics are measured, in the order of `latents_mean`.

    Args:
        latents: of any batch.
        by: "stream", "channel", or "query": each channel of each query of structure, each channel of dynamics.
    """
    if by == "stream":
        return [latents.structure, latents.dynamics]
    structure = latents.structure.flatten(1, 2) if by == "query" else latents.structure
    return [*structure.unbind(1), *latents.dynamics.unbind(1)]


def sum_latents(means: torch.Tensor, vae: VideoAutoencoder, by: str | None = None) -> list[list[float]]:
    """Count, sum and sum of squares, in float64, of packed latents (N, L), for each part of `split_latents`.

    Args:
        means: the latents.
        vae: their autoencoder.
        by: the parts; None: channels or streams, as the autoencoder's `normalizes_channels` states.
    """
    by = by or ("channel" if vae.normalizes_channels else "stream")
    parts = [part.double() for part in split_latents(vae.unpack(means), by)]
    return [[x.numel(), x.sum().item(), x.square().sum().item()] for x in parts]


def compute_statistics(sums: Sequence[list[list[float]]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the parts of latents from the sums of parts; 0 and 1 for an empty stream."""
    mean, std = [], []
    for parts in zip(*sums, strict=True):
        count, total, squares = (math.fsum(column) for column in zip(*parts, strict=True))
        mean.append(total / count if count else 0.0)
        std.append(math.sqrt(max(squares / count - mean[-1] ** 2, 0.0)) if count else 1.0)
    return mean, std
