"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598), with a scale per stream, in an interval of noise."""

from __future__ import annotations

import logging

import torch
from diffusers import SchedulerMixin

from .schedulers import prediction_type_of

logger = logging.getLogger(__name__)


def apply_guidance(
    prediction: torch.Tensor, guidance_scale: float | tuple[float, float], sizes: tuple[int, int]
) -> torch.Tensor:
    """Combine conditional and unconditional predictions: uncond + scale * (cond - uncond).

    Args:
        prediction: (2 B, L), the conditional half first.
        guidance_scale: one for both streams, or (structure, dynamics).
        sizes: number of values in the structure and in the dynamics latent, L in total.

    Returns:
        (B, L).
    """
    conditional, unconditional = prediction.chunk(2)
    if not isinstance(guidance_scale, tuple):
        guidance_scale, sizes = (guidance_scale,), (prediction.shape[1],)
    differences = (conditional - unconditional).split(sizes, dim=1)
    scaled = [scale * difference for scale, difference in zip(guidance_scale, differences, strict=True)]
    return unconditional + torch.cat(scaled, dim=1)


def find_guided_steps(scheduler: SchedulerMixin, timesteps: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """Return for each step whether its noise level lies in the guidance interval.

    Guidance at high noise reduces variety and at low noise has no effect (Kynkäänniemi et al., arXiv 2404.07724).

    Args:
        scheduler: its config states the number of training timesteps.
        timesteps: `scheduler.timesteps`.
        interval: (lower, upper] as fractions of the training timesteps: 0 is clean, 1 pure noise.

    Raises:
        ValueError: if the interval excludes noise levels, and the scheduler's timesteps do not state them.
    """
    lower, upper = interval
    if (lower, upper) == (0, 1):
        return [True] * len(timesteps)
    flow = prediction_type_of(scheduler) == "flow_prediction"
    if not flow and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} does not support guidance_interval.")
    # Flow matching counts from 1 to N, others from 0 to N - 1. Rounding makes bounds on the grid of steps exact.
    first = 0 if flow else 1
    levels = [round((t + first) / scheduler.config.num_train_timesteps, 6) for t in timesteps.tolist()]
    return [lower < level <= upper for level in levels]


def warn_of_added_guidance() -> None:
    """Warn of guidance of a transformer with interval conditioning.

    Its config does not say whether it was trained with guidance (`diffusion.shortcut_guidance` other than 1).
    """
    logger.warning(
        "The denoising steps of a transformer with interval_conditioning include the guidance of its training "
        "(diffusion.shortcut_guidance); unless that was 1, further guidance distorts the clips: use guidance_scale=1 "
        "and no guider."
    )
