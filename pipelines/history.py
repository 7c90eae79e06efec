"""History: dynamics frames that a clip continues, at a noise level of their own (Diffusion Forcing, arXiv 2407.01392).

Guidance by history combines predictions with and without these frames (Song et al., arXiv 2502.06764, Section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin

from .latents import spread_streams
from .schedulers import estimate_clean, prediction_type_of

if TYPE_CHECKING:
    from .transformer_vidtwin import VidTwinTransformer3DModel


class History:
    """Kept dynamics frames, which the transformer sees at one noise level while it generates the others.

    Args:
        transformer: with `frame_timesteps`, which training with `diffusion.frame_timesteps` sets.
        scheduler: states the timesteps of the noise levels.
        kept_positions: kept positions in time of the dynamics latent.
        noise_level: at which the transformer sees them, as a fraction of the schedule from 0, clean, to 1.
        guidance_scale: of the prediction with history over the one without; 1 needs only the former.

    Raises:
        ValueError: as `find_kept_rows`.
    """

    def __init__(
        self,
        transformer: VidTwinTransformer3DModel,
        scheduler: SchedulerMixin,
        kept_positions: Sequence[int],
        noise_level: float = 0.0,
        guidance_scale: float = 1.0,
    ) -> None:
        self.transformer, self.scheduler, self.guidance_scale = transformer, scheduler, guidance_scale
        rows = find_kept_rows(transformer, kept_positions)
        self.is_kept = torch.zeros(1 + transformer.num_frame_rows, dtype=torch.bool)  # of structure and every row
        self.is_kept[[1 + row for row in rows]] = True
        self.timestep = fraction_to_timestep(scheduler, noise_level)
        self.noise_timestep = fraction_to_timestep(scheduler, 1.0)
        self.estimate: torch.Tensor | None = None  # of the clean latents without history, for self-conditioning

    def spread_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timesteps of structure and dynamics (N, 2) -> of structure and every row (N, 1 + R)."""
        rows = torch.cat([timesteps[:, :1], timesteps[:, 1:].expand(-1, len(self.is_kept) - 1)], dim=1)
        return self._set_kept(rows, self.timestep)

    def _set_kept(self, timesteps: torch.Tensor, timestep: float) -> torch.Tensor:
        """Replace the timesteps of kept rows in (..., 1 + R)."""
        timestep = timestep if timesteps.is_floating_point() else round(timestep)
        return timesteps.masked_fill(self.is_kept.to(timesteps.device), timestep)

    def guide(
        self,
        guided: torch.Tensor,
        conditional: torch.Tensor,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        noise: torch.Tensor,
        sizes: tuple[int, int],
        target_timestep: torch.Tensor | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """Add to a prediction (B, L) the difference that the history makes, times the scale - 1.

        Without history the kept frames are pure noise.

        Args:
            guided: prediction with history, after classifier-free guidance.
            conditional: prediction with history and the classes and prompts.
            model_input: noisy latents (B, L) with history.
            timestep: (B, 1 + R), from `spread_timesteps`.
            noise: standard normal (B, L).
            sizes: number of values in the structure and in the dynamics latent, L in total.
            target_timestep: that of the step, in the shape of `timestep`, for a model with interval conditioning.
            conditions: classes, prompts and images of the transformer's input.
        """
        if self.guidance_scale == 1:
            return guided
        transformer, dtype = self.transformer, self.transformer.dtype
        channels = transformer.dynamics_shape[0]
        is_kept = self.is_kept.to(model_input.device)
        timestep = self._set_kept(timestep, self.noise_timestep)
        latents = torch.where(spread_streams(is_kept[None], sizes, channels), noise, model_input)
        if target_timestep is not None:
            conditions["target_timestep"] = self._set_kept(target_timestep, self.noise_timestep)
        estimate = None if self.estimate is None else self.estimate.to(dtype)
        with transformer.cache_context("without_history"):
            output = transformer(latents.to(dtype), timestep, self_condition=estimate, **conditions, return_dict=False)
        without = output[0].to(guided.dtype)
        if transformer.config.self_conditioning and target_timestep is None:  # jumps are trained without
            levels = spread_streams(timestep, sizes, channels)
            self.estimate = estimate_clean(self.scheduler, without, levels, latents)
        return guided + (self.guidance_scale - 1) * (conditional - without)


def find_kept_rows(transformer: VidTwinTransformer3DModel, kept_positions: Sequence[int]) -> list[int]:
    """Return the rows of dynamics patches with the kept positions in time.

    Raises:
        ValueError: if the transformer was not trained with timesteps that differ between frames or has a single one
            for all dynamics frames, or kept and other positions share a patch.
    """
    num_rows, num_positions = transformer.num_frame_rows, transformer.dynamics_shape[1]
    if num_rows < 2:
        raise ValueError(
            "history_noise requires a transformer with a timestep per frame, but the dynamics patches of this one "
            "cover all frames."
        )
    if not transformer.config.frame_timesteps:
        raise ValueError(
            "history_noise requires a transformer trained with diffusion.frame_timesteps, and the config of this "
            "one says that it was not; its videos would show ghosts. Leave history_noise out, or train it so."
        )
    patch = num_positions // num_rows
    rows = sorted({position // patch for position in kept_positions})
    if len(set(kept_positions)) != len(rows) * patch:
        raise ValueError(
            f"kept_frames must be whole patches of {patch} positions of the dynamics latent, which share a "
            f"timestep, not the positions {sorted(set(kept_positions))}."
        )
    return rows


def fraction_to_timestep(scheduler: SchedulerMixin, fraction: float) -> float | int:
    """Return the timestep at a fraction in [0, 1] of the schedule, as in training; whole except in flow matching."""
    steps = scheduler.config.num_train_timesteps
    if prediction_type_of(scheduler) == "flow_prediction":
        return steps * fraction
    return min(int(steps * fraction), steps - 1)
