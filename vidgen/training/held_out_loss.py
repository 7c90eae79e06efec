"""Held-out loss of the DiT: its denoising error on clips that it is not trained on, by stream and timestep bin.

The training loss of a step is an average over few clips at random timesteps, so its noise hides slow progress. Here
clips, noise and timesteps are the same at every validation: they depend on the seed and the index of a clip only.
Every clip is denoised once in each of the equal bins of the schedule, as one batch, so the result does not depend on
the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import default_collate

from ..data.latent_cache import LatentCache
from ..losses.diffusion import DiffusionLoss, Text
from .sampler import derive_seed

DOMAIN = 0x48454C44  # separates these random numbers from those of the training samples

# Maps a batch of cached clips with normal `noise` (B, noise_size) to the normalized latents (B, L), the labels (B,),
# the noise to add, (B, L), the images (B, L_S) and the captions.
Prepared = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Text | None]
PrepareBatch = Callable[[dict[str, Any]], Prepared]


def held_out_names(streams: Sequence[str], num_bins: int, num_timesteps: int) -> list[str]:
    """Names of the values of `measure_held_out_loss`: `loss`, `structure`, `structure_t0-200` and so on."""
    return ["loss", *streams, *(f"{stream}_{name}" for stream in streams for name in _bins(num_bins, num_timesteps))]


def _bins(num_bins: int, num_timesteps: int) -> list[str]:
    edges = [round(num_timesteps * i / num_bins) for i in range(num_bins + 1)]
    return [f"t{low}-{high}" for low, high in zip(edges, edges[1:], strict=False)]


def measure_held_out_loss(
    objective: DiffusionLoss,
    cache: LatentCache,
    prepare: PrepareBatch,
    accelerator: Accelerator,
    *,
    noise_size: int,
    num_clips: int,
    num_bins: int,
    seed: int,
) -> dict[str, float]:
    """Mean squared errors of the prediction target, unweighted, nothing dropped; all processes call it.

    Args:
        objective: of the model to measure.
        cache: latents of the held-out clips.
        prepare: makes the model's input of a batch as the training does.
        noise_size: normal numbers that `prepare` needs per clip.
        num_clips: at most this many clips, evenly spaced in the cache.
        num_bins: K equal parts of the schedule, each with one random timestep per clip.

    Returns:
        On every process: the mean over clips and bins of each stream, `structure` and `dynamics`; of each bin, such as
        `structure_t0-200`; `loss`, the mean over the values of both streams.
    """
    indices = torch.linspace(0, len(cache) - 1, min(num_clips, len(cache))).round().long().tolist()
    errors: list[tuple[int, dict[str, list[float]]]] = []
    for index in indices[accelerator.process_index :: accelerator.num_processes]:
        noise, fractions = _draw(seed, index, num_bins, noise_size)
        batch = {**default_collate([cache[index]] * num_bins), "noise": noise}
        latents, labels, noise, image, text = prepare(send_to_device(batch, accelerator.device))
        timestep = objective.scale_timesteps(fractions.to(accelerator.device))
        by_stream = objective.stream_errors(latents, labels, noise, timestep, image, text)
        errors.append((index, {name: values.tolist() for name, values in by_stream.items()}))

    # Average in the order of the clips, so that the sums of any number of processes are equal.
    errors = sorted(gather_object(errors))
    by_bin = {
        stream: torch.tensor([values[stream] for _, values in errors], dtype=torch.float64).mean(dim=0)
        for stream in errors[0][1]
    }
    sizes = dict(zip(("structure", "dynamics"), objective.sizes, strict=True))
    means = {stream: values.mean().item() for stream, values in by_bin.items()}
    total = sum(sizes[stream] * mean for stream, mean in means.items()) / sum(sizes.values())
    steps = objective.scheduler.config.num_train_timesteps
    binned = {
        f"{stream}_{name}": value
        for stream, values in by_bin.items()
        for name, value in zip(_bins(num_bins, steps), values.tolist(), strict=True)
    }
    return {"loss": total, **means, **binned}


def _draw(seed: int, index: int, num_bins: int, noise_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise (K, noise_size) of a clip, and one fraction of the schedule (K,) in each of K bins."""
    generator = torch.Generator().manual_seed(derive_seed(seed, index, 0, DOMAIN))
    noise = torch.randn(num_bins, noise_size, generator=generator)
    return noise, (torch.arange(num_bins) + torch.rand(num_bins, generator=generator)) / num_bins
