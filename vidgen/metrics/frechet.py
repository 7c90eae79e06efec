"""The Fréchet distance between two sets of feature vectors, and the statistics it is computed from.

Heusel et al., "GANs trained by a two time-scale update rule" (2017): the sets are taken as Gaussians, and

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1^1/2 S2 S1^1/2).

With I3D features of clips this is the Fréchet video distance. Everything here is float64 on the CPU.

A distance of N samples is one draw, and too large: both are told from statistics kept in groups of samples
(`GroupedStatistics`), by `bootstrap_interval` and `frechet_infinity`. `ClassScore` is the inception score's formula.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce


class RankDeficientWarning(UserWarning):
    """No more samples than dimensions: the covariance misses directions, and the distance is biased upwards."""


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that arrive in batches, in any order, from any process.

    Batches are folded in by their means and scatter matrices (Chan, Golub and LeVeque 1979), so a mean far from zero
    costs no digits and the result depends on order and batching by rounding alone.

    Attributes:
        count: the number of vectors N so far.
        mean: (D,), float64.
        scatter: (D, D), float64: the sum over vectors of (x - mean)(x - mean)^T.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"feature vectors need 1 dimension or more, not {dim}.")
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @classmethod
    def of(cls, features: torch.Tensor) -> FeatureStatistics:
        """The statistics of features (N, D)."""
        if features.ndim != 2:
            raise ValueError(f"features must be (N, D), but have shape {tuple(features.shape)}.")
        statistics = cls(features.shape[1])
        statistics.update(features)
        return statistics

    @property
    def dim(self) -> int:
        """D, the length of a feature vector."""
        return len(self.mean)

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), float64, divided by N - 1. Raises `ValueError` for fewer than 2 vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 feature vectors or more, but there are {self.count}.")
        return self.scatter / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few vectors for a covariance of full rank, N <= D."""
        return self.count <= self.dim

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """Add features (N, D) of any float type and device; N may be 0.

        Raises:
            ValueError: if the shape is not (N, D) or a value is not finite; nothing is added then.
        """
        features = _checked(features, self.dim).double()
        if len(features):
            mean = features.mean(dim=0)
            centered = features - mean
            self._fold(len(features), mean, centered.T @ centered)

    def merge(self, other: FeatureStatistics) -> None:
        """Add another process's or dataset's statistics to these. Raises `ValueError` if D differs."""
        if other.dim != self.dim:
            raise ValueError(f"cannot merge statistics of {other.dim} dimensions into {self.dim}.")
        if other.count:
            self._fold(other.count, other.mean, other.scatter)

    def _fold(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total


def _checked(features: torch.Tensor, dim: int) -> torch.Tensor:
    """Features (N, D) on the CPU, apart from any graph. Raises `ValueError` for another shape, NaN or infinity."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must be (N, {dim}), but have shape {tuple(features.shape)}.")
    features = features.detach().cpu()
    broken = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(features)} feature vectors are not finite, the first in row {broken[0]}."
        )
    return features


def group_of(number: int, num_groups: int) -> int:
    """The group of a sample, 0 to `num_groups` - 1: a fixed hash of its number, unrelated to any order."""
    return int.from_bytes(hashlib.blake2b(b"%d" % number, digest_size=8).digest(), "little") % num_groups


class GroupedStatistics:
    """`FeatureStatistics` kept apart for groups of samples: whose resampling says how far to trust a distance.

    A sample belongs to the group that `group_of` gives its number, whatever process or batch it comes in, so the
    result depends on those by rounding alone. Memory is the groups' and a few thousand rows', however many samples.

    Args:
        dim: D, the length of a feature vector.
        num_groups: G; by default 64, and down to 16 where they would take more than 256 MiB.

    """

    PENDING = 4096  # rows that wait, so that a group is updated with many at a time

    def __init__(self, dim: int, num_groups: int | None = None) -> None:
        if dim < 1:
            raise ValueError(f"feature vectors need 1 dimension or more, not {dim}.")
        num_groups = num_groups or min(64, max(16, 2**25 // dim**2))
        self._counts = torch.zeros(num_groups, dtype=torch.int64)
        self._means = torch.zeros(num_groups, dim, dtype=torch.float64)
        self._scatters = torch.zeros(num_groups, dim, dim, dtype=torch.float64)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def of(
        cls, features: torch.Tensor, numbers: Sequence[int] | None = None, num_groups: int | None = None
    ) -> GroupedStatistics:
        """The statistics of features (N, D) of samples with these numbers; 0 to N - 1 by default."""
        if features.ndim != 2:
            raise ValueError(f"features must be (N, D), but have shape {tuple(features.shape)}.")
        statistics = cls(features.shape[1], num_groups)
        statistics.update(features, range(len(features)) if numbers is None else numbers)
        return statistics

    @property
    def dim(self) -> int:
        """D, the length of a feature vector."""
        return self._means.shape[1]

    @property
    def counts(self) -> torch.Tensor:
        """(G,), int64: vectors in each group."""
        self._flush()
        return self._counts

    @property
    def means(self) -> torch.Tensor:
        """(G, D), float64; zero in a group without vectors."""
        self._flush()
        return self._means

    @property
    def scatters(self) -> torch.Tensor:
        """(G, D, D), float64, about the group's own mean."""
        self._flush()
        return self._scatters

    @property
    def filled(self) -> torch.Tensor:
        """The numbers of the groups that have vectors, int64, at most G: those that can be drawn anew."""
        return self.counts.nonzero().flatten()

    @torch.no_grad()
    def update(self, features: torch.Tensor, numbers: Sequence[int]) -> None:
        """Add features (N * R, D) of N samples by their numbers; the R vectors of a sample stand together.

        Raises:
            ValueError: if the shape does not fit or a value is not finite; nothing is added then.
        """
        features = _checked(features, self.dim)
        if len(features) % len(numbers) if len(numbers) else len(features):
            raise ValueError(f"{len(features)} feature vectors cannot be those of {len(numbers)} samples.")
        if not len(numbers):
            return
        groups = torch.tensor([group_of(int(number), len(self._counts)) for number in numbers])
        self._pending.append((features, groups.repeat_interleave(len(features) // len(numbers))))
        if sum(len(rows) for rows, _ in self._pending) >= self.PENDING:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        features, groups = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        for group in groups.unique().tolist():
            part = self.group(group)
            part.update(features[groups == group])
            self._counts[group], self._means[group], self._scatters[group] = part.count, part.mean, part.scatter

    def group(self, group: int) -> FeatureStatistics:
        """The statistics of one group; a copy."""
        self._flush()
        statistics = FeatureStatistics(self.dim)
        statistics.count = int(self._counts[group])
        statistics.mean, statistics.scatter = self._means[group].clone(), self._scatters[group].clone()
        return statistics

    def merged(self, times: torch.Tensor | None = None) -> FeatureStatistics:
        """The statistics of all groups together, group g taken `times[g]` (G,) times; once by default.

        Chan, Golub and LeVeque's formula for many parts at once.
        """
        times = torch.ones_like(self.counts) if times is None else times
        weights = (self.counts * times).double()
        statistics = FeatureStatistics(self.dim)
        statistics.count = int(weights.sum())
        if statistics.count:
            statistics.mean = weights @ self.means / statistics.count
            apart = self.means - statistics.mean
            within = torch.tensordot(times.double(), self.scatters, dims=1)
            statistics.scatter = within + (weights[:, None] * apart).T @ apart
        return statistics

    def halves(self) -> tuple[GroupedStatistics, GroupedStatistics]:
        """The groups of even and of odd number apart: two sets without a sample in common, about half as large."""
        parts = []
        for parity in (0, 1):
            part = GroupedStatistics(self.dim, len(self.counts))
            for mine, theirs in zip(part.state_dict().values(), self.state_dict().values(), strict=True):
                mine[parity::2] = theirs[parity::2]
            parts.append(part)
        return parts[0], parts[1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`counts`, `means` and `scatters`: what `from_state_dict` takes."""
        return {"counts": self.counts, "means": self.means, "scatters": self.scatters}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> GroupedStatistics:
        """The inverse of `state_dict`. Raises `ValueError` for missing keys, other shapes, or non-finite values."""
        missing = {"counts", "means", "scatters"} - state.keys()
        if missing:
            raise ValueError(f"grouped statistics need counts, means and scatters; {sorted(missing)} are missing.")
        counts, means, scatters = state["counts"].long(), state["means"].double(), state["scatters"].double()
        if counts.ndim != 1 or means.shape[:-1] != counts.shape or scatters.shape != (*means.shape, means.shape[-1]):
            raise ValueError(
                "grouped statistics need counts (G,), means (G, D) and scatters (G, D, D), but have shapes "
                f"{tuple(counts.shape)}, {tuple(means.shape)} and {tuple(scatters.shape)}."
            )
        if not (torch.isfinite(means).all() and torch.isfinite(scatters).all()) or (counts < 0).any():
            raise ValueError("grouped statistics hold negative counts, NaN or infinite values.")
        statistics = cls(means.shape[1], len(counts))
        statistics._counts, statistics._means, statistics._scatters = counts, means, scatters
        return statistics


def added_up(statistics: GroupedStatistics) -> GroupedStatistics:
    """The statistics of all processes' samples, on all of them. Memory does not grow with the number of processes.

    Two sums: of the means, weighted, for the common mean, and of the scatters about it.
    """
    if PartialState().num_processes == 1:
        return statistics
    state = statistics.state_dict()
    counts = summed(state["counts"])
    share = (state["counts"] / counts.clamp(min=1)).double()[:, None]
    means = summed(share * state["means"])
    apart = state["means"] - means
    spread = state["counts"][:, None, None] * apart[:, :, None] * apart[:, None, :]
    scatters = summed(state["scatters"] + spread)
    return GroupedStatistics.from_state_dict({"counts": counts, "means": means, "scatters": scatters})


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors of one shape and type, on all of them, on the CPU."""
    return reduce(values.to(PartialState().device), "sum").cpu()


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The squared Fréchet distance d^2 between two sets of features, as FID and FVD are reported; never negative.

    Both covariances get a square root from their eigenvalues, S = R R^T. With the singular values U s V^T of R2^T R1,
    tr sqrt(S1^1/2 S2 S1^1/2) is the sum of s, and the covariance part of d^2 equals |R1 - R2 U V^T|^2. Taken in this
    form nothing cancels: nearly equal sets keep their digits, where the traces would leave rounding noise.

    Args:
        a, b: statistics of 2 vectors or more each, of the same dimension D.

    Warns:
        RankDeficientWarning: if either set has no more vectors than dimensions.

    Raises:
        ValueError: for fewer than 2 vectors, or different dimensions.
    """
    if a.dim != b.dim:
        raise ValueError(f"cannot compare features of {a.dim} and {b.dim} dimensions.")
    root_a, root_b = _root(a), _root(b)
    if a.rank_deficient or b.rank_deficient:
        warnings.warn(
            f"the Fréchet distance of {a.count} and {b.count} samples in {a.dim} dimensions is biased upwards: "
            f"use more than {a.dim} samples on both sides.",
            RankDeficientWarning,
            stacklevel=2,
        )
    u, _, vh = torch.linalg.svd(root_b.T @ root_a)
    return float((a.mean - b.mean).square().sum() + (root_a - root_b @ (u @ vh)).square().sum())


def _root(statistics: FeatureStatistics) -> torch.Tensor:
    """R (D, D) with R R^T = covariance, without the directions that are rounding noise.

    An eigenvalue below D * eps times the largest is not told from zero (the rule of `numpy.linalg.matrix_rank`), as
    most are with fewer samples than dimensions. It must go: the root of noise is not small, sqrt(1e-16) = 1e-8.
    """
    eigenvalues, vectors = torch.linalg.eigh(statistics.covariance)  # ascending
    threshold = eigenvalues[-1].clamp(min=0) * statistics.dim * torch.finfo(torch.float64).eps
    return vectors * torch.where(eigenvalues > threshold, eigenvalues, 0).sqrt()


# --- how far to trust a distance -------------------------------------------------------------------------------------


def bootstrap_interval(
    a: GroupedStatistics,
    b: GroupedStatistics,
    *,
    level: float = 0.95,
    resamples: int = 100,
    paired: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """The interval in which the distance of a and b lies on average over samples like these, at their count.

    Groups are drawn with replacement on both sides (a cluster bootstrap). Sets with repetitions are further apart
    than sets without, so the resampled distances d* lie above the distance d, and their plain quantiles would miss it.
    So the interval is centered, [d - q_hi, d - q_lo] with q the quantiles of d* - mean(d*): the "basic" interval less
    its shift. The bias of the sample count stays in it as it stays in d; `frechet_infinity` is about that.

    Args:
        level: of confidence, in (0, 1).
        resamples: draws; for 400 dimensions each takes 0.1 to 0.2 s.
        paired: whether the samples of both sides belong together by their numbers, as clips and their reconstructions
            do: the same groups are then drawn on both sides.
        seed: of the draws; the same for the same seed.

    Raises:
        ValueError: if a side has fewer than 2 groups with samples, or what `frechet_distance` raises.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        times = _draw(a, rng)
        drawn.append(_quiet_distance(a.merged(times), b.merged(times if paired else _draw(b, rng))))
    low, high = np.quantile(np.array(drawn) - np.mean(drawn), [(1 - level) / 2, (1 + level) / 2])
    value = _quiet_distance(a.merged(), b.merged())
    return max(0.0, float(value - high)), float(value - low)


INFINITY_GROUPS = 8  # that have samples, for subsets of different sizes


def frechet_infinity(
    a: GroupedStatistics, b: GroupedStatistics, *, sizes: int = 8, draws: int = 4, seed: int = 0
) -> float:
    """The distance extrapolated to infinitely many samples; an estimate that may fall below zero by chance.

    Chong and Forsyth, "Effectively unbiased FID and Inception Score and where to find them" (2020): the bias of the
    distance of N samples goes as 1/N, so a line through the distances of several N, against 1/N, meets it at 0. They
    keep the real set whole; here subsets of groups shrink both sides by the same share, since both are samples.

    Args:
        sizes: numbers of groups, evenly spaced in 1/N from all of them down to a quarter, or to twice as many samples
            as dimensions.
        draws: random subsets of each size, averaged.
        seed: of the draws.

    Raises:
        ValueError: for fewer than 4 samples to a dimension, below which the bias does not go as 1/N, or fewer than
            `INFINITY_GROUPS` groups with samples, of which no quarter can be taken.
    """
    whole = [a.merged().count, b.merged().count]
    if min(len(a.filled), len(b.filled)) < INFINITY_GROUPS:
        raise ValueError(f"extrapolating needs samples in {INFINITY_GROUPS} groups or more.")
    if min(whole) < 4 * a.dim:
        raise ValueError(
            f"extrapolating from {min(whole)} samples in {a.dim} dimensions means nothing: use {4 * a.dim} or more."
        )
    rng = np.random.default_rng(seed)
    inverse, distances = [], []
    for stretch in np.linspace(1, min(4, min(whole) / (2 * a.dim)), sizes):
        for _ in range(1 if stretch == 1 else draws):
            parts = [side.merged(_choose(side, 1 / stretch, rng)) for side in (a, b)]
            inverse.append(sum(n / part.count for n, part in zip(whole, parts, strict=True)) / 2)
            distances.append(_quiet_distance(*parts))
    return float(np.polyfit(inverse, distances, 1)[1])


def _draw(statistics: GroupedStatistics, rng: np.random.Generator) -> torch.Tensor:
    """How often each group comes up when as many are drawn with replacement as have samples: (G,)."""
    filled = statistics.filled.numpy()
    if len(filled) < 2:
        raise ValueError(f"a bootstrap needs 2 groups of samples or more, but there are {len(filled)}.")
    drawn = rng.choice(filled, len(filled))
    return torch.from_numpy(np.bincount(drawn, minlength=len(statistics.counts)))


def _choose(statistics: GroupedStatistics, share: float, rng: np.random.Generator) -> torch.Tensor:
    """A random share of the groups that have samples, each once: (G,)."""
    filled = statistics.filled.numpy()
    chosen = rng.choice(filled, max(1, round(share * len(filled))), replace=False)
    return torch.from_numpy(np.bincount(chosen, minlength=len(statistics.counts)))


def _quiet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    with quiet_about_rank():
        return frechet_distance(a, b)


@contextmanager
def quiet_about_rank() -> Iterator[None]:
    """Within it no `RankDeficientWarning` is shown: for callers that say it in another way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)
        yield


# --- inception-style score -------------------------------------------------------------------------------------------


class ClassScore:
    """exp E KL(p(y|x) || p(y)): high where single clips are clearly of one class and all classes come up.

    The inception score's formula (Salimans et al. 2016) on whatever network gives the probabilities; name it, for
    instance `class_score_i3d`. UCF-101's "IS" is of a C3D finetuned on UCF-101, another number.

    `totals` (splits, K + 2), float64, holds for each split its sum of probabilities, sum of their negative entropies
    and count: several processes add theirs up, `score.totals = summed(score.totals)`.

    Args:
        num_classes: K, 2 or more.
        splits: parts, by `group_of` a sample's number, whose scores' mean and deviation are given.
    """

    def __init__(self, num_classes: int, splits: int = 10) -> None:
        self.totals = torch.zeros(splits, num_classes + 2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, probabilities: torch.Tensor, numbers: Sequence[int]) -> None:
        """Add probabilities (N, K) of samples by their numbers.

        Raises:
            ValueError: if the shape does not fit, or a row is no distribution.
        """
        splits, width = self.totals.shape
        if tuple(probabilities.shape) != (len(numbers), width - 2):
            raise ValueError(f"probabilities must be ({len(numbers)}, {width - 2}), not {tuple(probabilities.shape)}.")
        p = probabilities.detach().cpu().double()
        if not ((p >= 0).all() and ((p.sum(dim=1) - 1).abs() < 1e-3).all()):
            raise ValueError("probabilities must not be negative, and those of a sample must sum to 1.")
        rows = torch.cat([p, torch.xlogy(p, p).sum(dim=1, keepdim=True), torch.ones(len(p), 1).double()], dim=1)
        self.totals.index_add_(0, torch.tensor([group_of(int(n), splits) for n in numbers], dtype=torch.int64), rows)

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation of the splits' scores, each 1 to K. Raises `ValueError` before any sample."""
        filled = self.totals[self.totals[:, -1] > 0]
        if not len(filled):
            raise ValueError("no probabilities to score: call update(probabilities, numbers) first.")
        shares = filled / filled[:, -1:]
        marginal = shares[:, :-2]
        scores = (shares[:, -2] - torch.xlogy(marginal, marginal).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
