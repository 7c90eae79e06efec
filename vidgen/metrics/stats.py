"""Bootstrap confidence intervals of figures that are taken over clips. Everything is float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

RESAMPLES = 1000
CLIPS_AT_ONCE = 2**20  # clips of resamples that are drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Score:
    """A figure of test clips.

    Attributes:
        value: the figure of all test clips.
        low, high: its 95 % bootstrap interval.
        chance: the score of the best guess that looks at no clip; None where there is no such guess.
    """

    value: float
    low: float
    high: float
    chance: float | None = None


def share(hits: torch.Tensor, chance: float | None = None) -> Score:
    """Return the share of clips that hit, bool (M,), with its interval."""
    return mean(hits.double(), chance)


def mean(values: torch.Tensor, chance: float | None = None) -> Score:
    """Return the mean of the clips' values (M,), with its interval."""
    return ratio(values, torch.ones_like(values), chance)


def ratio(numerators: torch.Tensor, denominators: torch.Tensor, chance: float | None = None, seed: int = 0) -> Score:
    """Return the ratio of two sums over clips, both (M,), with its interval from resampled clips.

    A resample whose denominators are all zero does not count.

    Raises:
        ValueError: if there are no clips.
    """
    if not len(numerators):
        raise ValueError("a score needs 1 clip or more.")
    both = torch.stack([numerators, denominators], dim=1).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    parts = torch.arange(RESAMPLES).split(max(1, CLIPS_AT_ONCE // len(both)))
    drawn = (torch.randint(len(both), (len(part), len(both)), generator=generator) for part in parts)
    value, sums = both.sum(dim=0), torch.cat([both[resamples].sum(dim=1) for resamples in drawn])
    bounds = (sums[:, 0] / sums[:, 1]).nanquantile(both.new_tensor([0.025, 0.975]))
    return Score((value[0] / value[1]).item(), *bounds.tolist(), chance)


def mean_interval(
    values: Sequence[float], groups: Sequence[Any] | None = None
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % bootstrap interval of a mean; the same for the same values.

    Args:
        values: one for each clip.
        groups: the group of each, such as its video: whole groups are drawn, because clips of one video are alike.

    Returns:
        The lower and upper end; None for both if there is a single group, which does not show how groups differ.
    """
    names = range(len(values)) if groups is None else groups
    index_of = {name: index for index, name in enumerate(dict.fromkeys(names))}
    indices = np.array([index_of[name] for name in names])
    sums, counts = np.bincount(indices, weights=np.asarray(values, dtype=np.float64)), np.bincount(indices)
    if len(sums) == 1:
        return None, None
    score = ratio(torch.from_numpy(sums), torch.from_numpy(counts))
    return score.low, score.high
