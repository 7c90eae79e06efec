"""Shortcut training of the DiT: steps of any length, learned from two steps of half that length.

A DiT with interval conditioning is a flow map F(z_t, t, r): its prediction leads from noisy latents z_t to those at
any lower timestep r of the same trajectory in one step of the scheduler (`pipelines.schedulers.jump_coefficients`).
For r = t it is the velocity that the ordinary loss trains. The jump to r is learned from the model's jumps to the
midpoint and from there to r, as in shortcut models (Frans et al., arXiv 2410.12557, Section 3.2) and, for any two
timesteps, in flow map matching (Boffi et al., arXiv 2406.07507) and Align Your Flow (Sabour et al., arXiv 2506.14603).
The shortest jumps are learned from the velocity, with classifier-free guidance, which all longer jumps inherit. All
targets are of a moving average of the model, as in shortcut models: those of the model itself were unstable. The
velocity can be that of a frozen teacher instead, so that guidance does not add up (Meng et al., arXiv 2210.03142).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from pipelines.latents import spread_streams
from pipelines.schedulers import JUMP_TYPES, clean_timestep, jump_coefficients

from ..common.errors import UserError

SHORTEST = 1 / 64  # shortest interval, as a fraction of the schedule
WEIGHT_OFFSET = 1e-2

# Maps latents (B, L), timesteps (B, 2), target timesteps (B, 2), and bool (B,), which clips lose class and caption, to
# the model's prediction (B, L).
Predict = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Jumps:
    """The jumps that a batch is trained on.

    Attributes:
        start, target: timesteps of each stream (B, 2); equal where a stream does not move and has the ordinary loss.
        is_short: bool (B,), which clips learn from the guided velocity; the others learn from two half jumps.
    """

    start: torch.Tensor
    target: torch.Tensor
    is_short: torch.Tensor

    @property
    def moves(self) -> torch.Tensor:
        """Bool (B, 2), which streams jump."""
        return self.start != self.target

    @property
    def midpoint(self) -> torch.Tensor:
        """Timesteps (B, 2), whole numbers if those of the schedule are."""
        total = self.start + self.target
        return total / 2 if total.is_floating_point() else total.div(2, rounding_mode="floor")


def check_shortcut(prediction_type: str, has_intervals: bool) -> None:
    """Raise a `UserError` if a DiT cannot be trained on jumps.

    Args:
        prediction_type: of the scheduler.
        has_intervals: whether the DiT has interval conditioning.
    """
    if prediction_type not in JUMP_TYPES:
        raise UserError(
            f"diffusion.shortcut needs diffusion.prediction_type {' or '.join(JUMP_TYPES)}, not {prediction_type}."
        )
    if not has_intervals:
        raise UserError(
            "diffusion.shortcut trains a DiT with interval conditioning: set "
            "model.overrides.interval_conditioning=true."
        )


def draw_jumps(
    scheduler: SchedulerMixin,
    scale: Callable[[torch.Tensor], torch.Tensor],
    fractions: torch.Tensor,
    moves: torch.Tensor,
    uniform: torch.Tensor,
    base: float,
) -> Jumps:
    """Draw an interval for each clip, and its place in the schedule.

    The interval is log-uniform in [1/64, 1] of the schedule: every octave has equally many clips, as in shortcut
    models, so that a jump and its halves are learned equally fast. The target may be any timestep down to the clean
    latents.

    Args:
        scheduler: states the timestep of clean latents.
        scale: maps fractions of the schedule to timesteps.
        fractions: in [0, 1) for each stream (B, 2): the timestep of a stream that does not move; otherwise the place
            of its interval.
        moves: bool (B, 2), which streams jump.
        uniform: random numbers in [0, 1) for the intervals (B,).
        base: intervals up to it are short, as a fraction of the schedule.
    """
    interval = SHORTEST ** (1 - uniform)
    spans = interval[:, None] * moves
    start = scale(spans + (1 - spans) * fractions)
    length = spans * scheduler.config.num_train_timesteps
    length = length if start.is_floating_point() else length.ceil().long()
    target = torch.where(moves, (start - length).clamp(min=clean_timestep(scheduler)), start)
    return Jumps(start, target, interval <= base)


def jump(
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    prediction: torch.Tensor,
    start: torch.Tensor,
    target: torch.Tensor,
    sizes: tuple[int, int],
) -> torch.Tensor:
    """The latents (B, L) at the target timesteps (B, 2), from those at the start timesteps and a prediction."""
    keep, remove = (spread_streams(x, sizes) for x in jump_coefficients(scheduler, start, target))
    return keep * latents - remove * prediction


@torch.no_grad()
def shortcut_target(
    scheduler: SchedulerMixin,
    predict: Predict,
    noisy: torch.Tensor,
    jumps: Jumps,
    guidance_scale: float,
    sizes: tuple[int, int],
    velocity: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prediction that a jump should have, from two passes of a model.

    Every clip takes part in both passes, so that no shape depends on the data. The first pass predicts the velocity or
    the first half jump; the second predicts the velocity without a class or the second half jump.

    Args:
        scheduler: states the prediction type and the noise levels.
        predict: the model.
        noisy: latents at `jumps.start` (B, L).
        jumps: their timesteps.
        guidance_scale: classifier-free guidance of the velocity in short jumps.
        sizes: number of values in the structure and in the dynamics latent, L in total.
        velocity: guided velocity at `jumps.start` (B, L), of a teacher; None: the model's.

    Returns:
        The target (B, L) of streams that move, float32; and the first pass's prediction (B, L), which is the velocity
        in clips that do not move. Other values are arbitrary.
    """
    halved = jumps.moves.any(dim=1) & ~jumps.is_short
    start, middle, end = jumps.start, jumps.midpoint, jumps.target

    def select(if_halved: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
        return torch.where(halved[:, None], if_halved, otherwise)

    velocity_or_half = predict(noisy, start, select(middle, start), torch.zeros_like(halved)).float()
    halfway = jump(scheduler, noisy, velocity_or_half, start, middle, sizes)
    second = predict(select(halfway, noisy), select(middle, start), select(end, start), ~halved).float()

    # Solve the step of the scheduler that leads to the end of both half jumps for its prediction.
    reached = jump(scheduler, halfway, second, middle, end, sizes)
    keep, remove = (spread_streams(x, sizes) for x in jump_coefficients(scheduler, start, end))
    composed = (keep * noisy - reached) / torch.where(remove > 0, remove, 1)
    if velocity is None:
        velocity = second + guidance_scale * (velocity_or_half - second)
    return select(composed, velocity.float()), velocity_or_half


def shortcut_weight(error: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """The weight (B, L) of the squared errors (B, L) of jumps: (mean of the clip's stream + 0.01)^-1/2.

    The targets of jumps have no noise, so their errors are small beside those of the ordinary loss; the weight makes
    the loss proportional to the root of the error (Geng et al., arXiv 2505.13447, Equation 22, p = 0.5).
    """
    means = [part.mean(dim=1) if part.numel() else part.sum(dim=1) for part in error.detach().split(sizes, dim=1)]
    return spread_streams((torch.stack(means, dim=1) + WEIGHT_OFFSET).rsqrt(), sizes)
