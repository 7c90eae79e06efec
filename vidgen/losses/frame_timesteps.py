"""A timestep for each row of dynamics frames in training (Diffusion Forcing, Chen et al., arXiv 2407.01392).

Half of the clips with such timesteps have an independent one in each row, as in Diffusion Forcing: any frame can then
be the condition of any other. The other half have the case of roll-outs, which independent timesteps hardly ever draw:
a prefix of rows is the history, and the rest share one timestep. The history is clean in half of these clips, noisy in
a quarter, and pure noise, which is no history, in a quarter: history guidance (Song et al., arXiv 2502.06764) compares
predictions with and without. Where the streams have independent timesteps, the structure of such a clip is clean,
noisy or pure noise with the same frequencies, as the anchor of a roll-out. What is exactly clean has no loss: the
model cannot predict its noise, and its clean latents are the input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.errors import UserError

FRAME_DRAWS = 3  # uniform random numbers per clip, besides one for each row


@dataclass(frozen=True)
class FrameFractions:
    """Places in the schedule of structure and of every row of dynamics frames.

    Attributes:
        fractions: in [0, 1], from clean to pure noise (B, 1 + R).
        is_clean: bool (B, 1 + R), what is a clean condition and has no loss.
    """

    fractions: torch.Tensor
    is_clean: torch.Tensor


def check_frame_timesteps(num_rows: int, num_dynamics_values: int) -> None:
    """Raise a `UserError` if a DiT has no rows of dynamics frames that could have different timesteps.

    Args:
        num_rows: rows of dynamics patches of the DiT.
        num_dynamics_values: of the dynamics latent.
    """
    if num_rows < 2 or not num_dynamics_values:
        raise UserError(
            "diffusion.frame_timesteps needs two or more rows of dynamics patches, but this DiT has "
            f"{num_rows if num_dynamics_values else 0}: set model.overrides.dynamics_patch_size to patches over fewer "
            "frames."
        )


def condition_fractions(uniform: torch.Tensor) -> torch.Tensor:
    """Places of a condition in the schedule from uniform numbers: half are 0, a quarter 1, the others uniform."""
    return (4 * uniform - 2).clamp(0, 1)


def draw_frame_fractions(
    fraction: float,
    streams: torch.Tensor,
    rows: torch.Tensor,
    is_independent: torch.Tensor,
    structure_uniform: torch.Tensor,
    uniform: torch.Tensor,
) -> FrameFractions:
    """Draw the places in the schedule of structure and every row; see the module.

    Args:
        fraction: of the clips whose rows have separate timesteps.
        streams: places in the schedule of structure and dynamics (B, 2), of the other clips and rows.
        rows: independent places of the rows (B, R).
        is_independent: bool (B,), the clips whose structure has another timestep than dynamics.
        structure_uniform: numbers in [0, 1) for the noise of a structure that is a condition (B,).
        uniform: (B, FRAME_DRAWS) in [0, 1): which clips, the length of the history, and its noise.
    """
    chosen, length, noise = uniform[:, :, None].unbind(1)
    structure, dynamics = streams.split(1, dim=1)
    has_history, is_separate = chosen < fraction / 2, chosen < fraction
    num_rows = rows.shape[1]
    history_length = 1 + (length * (num_rows - 1)).floor()  # 1 to R - 1
    is_history = has_history & (torch.arange(num_rows, device=rows.device) < history_length)
    is_anchor = has_history & is_independent[:, None]

    independent = torch.where(is_separate & ~has_history, rows, dynamics)
    fractions = torch.cat(
        [
            torch.where(is_anchor, condition_fractions(structure_uniform[:, None]), structure),
            torch.where(is_history, condition_fractions(noise), independent),
        ],
        dim=1,
    )
    return FrameFractions(fractions, torch.cat([is_anchor, is_history], dim=1) & (fractions == 0))
