"""The Fréchet distance between two sets of feature vectors, and the statistics from which it is computed.

Heusel et al., "GANs trained by a two time-scale update rule" (2017): the sets are taken as Gaussians, and

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1^1/2 S2 S1^1/2).

With I3D features of clips this is the Fréchet video distance. Everything here is float64 on the CPU.

The distance of N samples is a random variable with a positive bias. `FeatureStatistics` keeps groups of samples apart,
from which `bootstrap_interval` estimates its spread and `frechet_infinity` its value without the bias. `ClassScore` is
the formula of the inception score.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import scipy.linalg
import torch
from accelerate import PartialState
from accelerate.utils import reduce


class RankDeficientWarning(UserWarning):
    """There are no more samples than dimensions: the covariance is singular, and the distance is biased upwards."""


# --- statistics -----------------------------------------------------------------------------------------------------


def group_of(number: int, num_groups: int) -> int:
    """Return the group of a sample, 0 to `num_groups` - 1: a hash of its number, unrelated to any order."""
    return int.from_bytes(hashlib.blake2b(b"%d" % number, digest_size=8).digest(), "little") % num_groups


def choose_num_groups(dim: int) -> int:
    """Return the number of groups for resampling: 64, and down to 16 where 64 would take more than 256 MiB."""
    return min(64, max(16, 2**25 // dim**2))


class FeatureStatistics:
    """Count, mean and scatter of feature vectors that arrive in batches, in any order, in one or several groups.

    Batches are added by their means and scatter matrices (Chan, Golub and LeVeque 1979): a mean far from zero costs no
    digits, and the result depends on order and batching by rounding only. A sample belongs to the group that
    `group_of` gives its number, so processes and batches do not matter either. Memory does not grow with samples.

    Args:
        dim: D, the length of a feature vector.
        num_groups: G; `choose_num_groups` gives one that suits resampling.
    """

    PENDING = 4096  # rows that are buffered, so that groups are updated with many at a time

    def __init__(self, dim: int, num_groups: int = 1) -> None:
        if dim < 1:
            raise ValueError(f"feature vectors need 1 dimension or more, not {dim}.")
        self._counts = torch.zeros(num_groups, dtype=torch.int64)
        self._means = torch.zeros(num_groups, dim, dtype=torch.float64)
        self._scatters = torch.zeros(num_groups, dim, dim, dtype=torch.float64)
        self._same_sample = torch.zeros(num_groups, 2, dtype=torch.float64)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def of(
        cls, features: torch.Tensor, numbers: Sequence[int] | None = None, num_groups: int = 1
    ) -> FeatureStatistics:
        """Return the statistics of features (N, D) of samples with these numbers; 0 to N - 1 by default."""
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
        """(G,), int64: number of vectors in each group."""
        self._flush()
        return self._counts

    @property
    def means(self) -> torch.Tensor:
        """(G, D), float64; zero in a group without vectors."""
        self._flush()
        return self._means

    @property
    def scatters(self) -> torch.Tensor:
        """(G, D, D), float64: in each group the sum of (x - mean)(x - mean)^T."""
        self._flush()
        return self._scatters

    @property
    def same_sample(self) -> torch.Tensor:
        """(G, 2), float64: over the pairs of vectors x, y of one sample, x = y included, the sum of (x . y)^2 and the
        number of pairs, which `mmd` leaves out. NaN in statistics that were saved without them.
        """
        return self._same_sample

    @property
    def filled(self) -> torch.Tensor:
        """Indices of the groups that have vectors, int64: those that can be resampled."""
        return self.counts.nonzero().flatten()

    @property
    def count(self) -> int:
        """Number of vectors N in all groups."""
        return int(self.counts.sum())

    @property
    def mean(self) -> torch.Tensor:
        """(D,), float64: the mean of all groups."""
        return self.merged().means[0]

    @property
    def covariance(self) -> torch.Tensor:
        """(D, D), float64: of all groups, divided by N - 1. Raises `ValueError` for fewer than 2 vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 feature vectors or more, but there are {self.count}.")
        return self.merged().scatters[0] / (self.count - 1)

    @property
    def rank_deficient(self) -> bool:
        """Whether there are too few vectors for a covariance of full rank, N <= D."""
        return self.count <= self.dim

    @torch.no_grad()
    def update(self, features: torch.Tensor, numbers: Sequence[int] | None = None) -> None:
        """Add features (N * R, D), of any float type and device, of N samples; the R rows of a sample are adjacent.

        Args:
            numbers: of the samples, which choose their groups; may be left out if there is one group.

        Raises:
            ValueError: if the shape does not fit or a value is not finite; nothing is added then.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (N, {self.dim}), but have shape {tuple(features.shape)}.")
        features = features.detach().to("cpu", copy=True)  # buffered, so the caller may change its tensor
        broken = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
        if len(broken):
            raise ValueError(
                f"{len(broken)} of {len(features)} feature vectors are not finite, the first in row {broken[0]}."
            )
        if numbers is None:
            if len(self._counts) > 1:
                raise ValueError("features need the numbers of their samples, which choose the groups.")
            numbers = range(len(features))
        if len(features) % len(numbers) if len(numbers) else len(features):
            raise ValueError(f"{len(features)} feature vectors cannot be those of {len(numbers)} samples.")
        if not len(numbers):
            return
        groups = torch.tensor([group_of(int(number), len(self._counts)) for number in numbers])
        rows = features.double().unflatten(0, (len(numbers), -1))
        products = (rows @ rows.mT).square().sum(dim=(1, 2))
        pairs = torch.full_like(products, rows.shape[1] ** 2)
        self._same_sample.index_add_(0, groups, torch.stack([products, pairs], dim=1))
        self._pending.append((features, groups.repeat_interleave(len(features) // len(numbers))))
        if sum(len(rows) for rows, _ in self._pending) >= self.PENDING:
            self._flush()

    def merge(self, other: FeatureStatistics) -> None:
        """Add other statistics group by group. Raises `ValueError` if D or G differ."""
        if other.means.shape != self.means.shape:
            raise ValueError(f"cannot merge statistics of {other.dim} dimensions into {self.dim}, or of other groups.")
        for group in other.filled.tolist():
            self._fold(group, int(other.counts[group]), other.means[group], other.scatters[group])
        self._same_sample += other.same_sample

    def _flush(self) -> None:
        """Add the buffered rows to their groups."""
        if not self._pending:
            return
        features, groups = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
        self._pending = []
        for group in groups.unique().tolist():
            rows = features[groups == group].double()
            mean = rows.mean(dim=0)
            centered = rows - mean
            self._fold(group, len(rows), mean, centered.T @ centered)

    def _fold(self, group: int, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add vectors with these statistics to a group."""
        present = int(self._counts[group])
        total = present + count
        delta = mean - self._means[group]
        self._scatters[group] += scatter
        self._scatters[group] += torch.outer(delta, delta) * (present * count / total)
        self._means[group] += delta * (count / total)
        self._counts[group] = total

    def merged(self, times: torch.Tensor | None = None) -> FeatureStatistics:
        """Return the statistics of all groups as one group; group g counts `times[g]` (G,) times, once by default.

        The formula of Chan, Golub and LeVeque for many parts at once.
        """
        if times is None and len(self.counts) == 1:
            return self
        times = torch.ones_like(self.counts) if times is None else times
        weights = (self.counts * times).double()
        statistics = FeatureStatistics(self.dim)
        statistics._counts[0] = count = int(weights.sum())
        statistics._same_sample[0] = times.double() @ self.same_sample
        if count:
            statistics._means[0] = mean = weights @ self.means / count
            deviations = self.means - mean
            within = torch.tensordot(times.double(), self.scatters, dims=1)
            statistics._scatters[0] = within + (weights[:, None] * deviations).T @ deviations
        return statistics

    def halves(self) -> tuple[FeatureStatistics, FeatureStatistics]:
        """Return the groups of even and of odd index: two sets of about half the size without a common sample."""
        parts = []
        for parity in (0, 1):
            part = FeatureStatistics(self.dim, len(self.counts))
            for target, source in zip(part.state_dict().values(), self.state_dict().values(), strict=True):
                target[parity::2] = source[parity::2]
            parts.append(part)
        return parts[0], parts[1]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return `counts`, `means`, `scatters` and `same_sample`, as `from_state_dict` takes them."""
        parts = {"counts": self.counts, "means": self.means, "scatters": self.scatters}
        return {**parts, "same_sample": self.same_sample}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> FeatureStatistics:
        """Invert `state_dict`; older states lack `same_sample`.

        Raises `ValueError` for missing keys, other shapes, or non-finite values.
        """
        missing = {"counts", "means", "scatters"} - state.keys()
        if missing:
            raise ValueError(f"feature statistics need counts, means and scatters; {sorted(missing)} are missing.")
        counts, means, scatters = state["counts"].long(), state["means"].double(), state["scatters"].double()
        if counts.ndim != 1 or means.shape[:-1] != counts.shape or scatters.shape != (*means.shape, means.shape[-1]):
            raise ValueError(
                "feature statistics need counts (G,), means (G, D) and scatters (G, D, D), but have shapes "
                f"{tuple(counts.shape)}, {tuple(means.shape)} and {tuple(scatters.shape)}."
            )
        if not (torch.isfinite(means).all() and torch.isfinite(scatters).all()) or (counts < 0).any():
            raise ValueError("feature statistics hold negative counts, NaN or infinite values.")
        statistics = cls(means.shape[1], len(counts))
        statistics._counts, statistics._means, statistics._scatters = counts, means, scatters
        statistics._same_sample = state.get("same_sample", torch.full((len(counts), 2), torch.nan)).double()
        return statistics


def reduce_statistics(statistics: FeatureStatistics) -> FeatureStatistics:
    """Return the statistics of all processes' samples, on all of them; memory does not grow with their number.

    Two sums: of the weighted means, for the common mean, and of the scatters around it.
    """
    if PartialState().num_processes == 1:
        return statistics
    state = statistics.state_dict()
    counts = reduce_sum(state["counts"])
    weights = (state["counts"] / counts.clamp(min=1)).double()[:, None]
    means = reduce_sum(weights * state["means"])
    deviations = state["means"] - means
    between = state["counts"][:, None, None] * deviations[:, :, None] * deviations[:, None, :]
    scatters = reduce_sum(state["scatters"] + between)
    same_sample = reduce_sum(state["same_sample"])
    return FeatureStatistics.from_state_dict(
        {"counts": counts, "means": means, "scatters": scatters, "same_sample": same_sample}
    )


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of all processes' tensors of one shape and type, on all of them, on the CPU."""
    return reduce(values.to(PartialState().device), "sum").cpu()


# --- distance -------------------------------------------------------------------------------------------------------


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Fréchet distance d^2 of two sets of features, as FID and FVD are reported; never negative.

    Both covariances get a square root from their eigenvalues, S = R R^T. With the singular values U s V^T of R2^T R1,
    tr sqrt(S1^1/2 S2 S1^1/2) is the sum of s, and the covariance part of d^2 equals |R1 - R2 U V^T|^2. In this form
    nothing cancels: nearly equal sets keep their digits, where a difference of traces would leave rounding noise.

    Args:
        a, b: statistics of at least 2 vectors each, of the same dimension D, in any number of groups.

    Warns:
        RankDeficientWarning: if either set has no more vectors than dimensions.

    Raises:
        ValueError: for fewer than 2 vectors, or different dimensions.
    """
    if a.dim != b.dim:
        raise ValueError(f"cannot compare features of {a.dim} and {b.dim} dimensions.")
    a, b = a.merged(), b.merged()
    root_a, root_b = _covariance_root(a), _covariance_root(b)
    if a.rank_deficient or b.rank_deficient:
        warnings.warn(
            f"the Fréchet distance of {a.count} and {b.count} samples in {a.dim} dimensions is biased upwards: "
            f"use more than {a.dim} samples on both sides.",
            RankDeficientWarning,
            stacklevel=2,
        )
    u, _, vh = torch.linalg.svd(root_b.T @ root_a)
    return float((a.mean - b.mean).square().sum() + (root_a - root_b @ (u @ vh)).square().sum())


def _covariance_root(statistics: FeatureStatistics) -> torch.Tensor:
    """Return R (D, D) with R R^T = covariance, without the directions that are rounding noise.

    An eigenvalue below D * eps times the largest one counts as zero (the rule of `numpy.linalg.matrix_rank`), as most
    are with fewer samples than dimensions. Noise must not remain, because its root is not small: sqrt(1e-16) = 1e-8.
    """
    eigenvalues, vectors = _eigh(statistics.covariance)
    threshold = eigenvalues[-1].clamp(min=0) * statistics.dim * torch.finfo(torch.float64).eps
    return vectors * torch.where(eigenvalues > threshold, eigenvalues, 0).sqrt()


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix (D, D)."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # divide and conquer may fail if many eigenvalues are equal; QR does not
        return tuple(map(torch.from_numpy, scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev")))


@contextmanager
def quiet_about_rank() -> Iterator[None]:
    """Suppress `RankDeficientWarning`, for callers that state the sample counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)
        yield


# --- interval and bias ----------------------------------------------------------------------------------------------


def bootstrap_interval(
    a: FeatureStatistics,
    b: FeatureStatistics,
    *,
    level: float = 0.95,
    resamples: int = 100,
    paired: bool = False,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a confidence interval of the expected distance of samples like a and b, at their count.

    Groups are drawn with replacement on both sides (a cluster bootstrap). Sets with repetitions are further apart than
    sets without, so the resampled distances d* lie above the distance d, and their plain quantiles would miss it. The
    interval is centered instead, [d - q_hi, d - q_lo] with q the quantiles of d* - mean(d*): the "basic" interval
    without its shift. It keeps the bias of the sample count, as d does; `frechet_infinity` removes that.

    Args:
        level: of confidence, in (0, 1).
        resamples: number of resampled distances; for 400 dimensions each takes 0.1 to 0.2 s.
        paired: whether samples of both sides with the same number belong together, as clips and reconstructions do:
            the same groups are then drawn on both sides.
        seed: random seed.

    Raises:
        ValueError: if a side has fewer than 2 groups with samples, or what `frechet_distance` raises.
    """
    rng = np.random.default_rng(seed)
    distances = []
    with quiet_about_rank():
        for _ in range(resamples):
            times = _draw_groups(a, rng)
            times_b = times if paired else _draw_groups(b, rng)
            distances.append(frechet_distance(a.merged(times), b.merged(times_b)))
        value = frechet_distance(a, b)
    low, high = np.quantile(np.array(distances) - np.mean(distances), [(1 - level) / 2, (1 + level) / 2])
    return max(0.0, float(value - high)), float(value - low)


INFINITY_GROUPS = 8  # groups with samples that `frechet_infinity` needs for subsets of different sizes


def frechet_infinity(
    a: FeatureStatistics, b: FeatureStatistics, *, sizes: int = 8, draws: int = 4, seed: int = 0
) -> float:
    """Return the distance extrapolated to infinitely many samples; an estimate that may be negative by chance.

    Chong and Forsyth, "Effectively unbiased FID and Inception Score and where to find them" (2020): the bias of the
    distance of N samples is proportional to 1/N, so a line through the distances of several N, against 1/N, is
    evaluated at 0. They keep the real set whole; here both sides are samples and are reduced by the same factor.

    Args:
        sizes: number of subset sizes, evenly spaced in 1/N from all groups down to a quarter of them, or to twice
            the number of dimensions.
        draws: random subsets per size.
        seed: random seed.

    Raises:
        ValueError: for fewer than 4 samples per dimension, below which the bias is not proportional to 1/N, or fewer
            than `INFINITY_GROUPS` groups with samples.
    """
    sides = (a, b)
    counts = [side.count for side in sides]
    if min(len(side.filled) for side in sides) < INFINITY_GROUPS:
        raise ValueError(f"extrapolating needs samples in {INFINITY_GROUPS} groups or more.")
    if min(counts) < 4 * a.dim:
        raise ValueError(
            f"extrapolating from {min(counts)} samples in {a.dim} dimensions means nothing: use {4 * a.dim} or more."
        )
    rng = np.random.default_rng(seed)
    inverse_sizes, distances = [], []
    with quiet_about_rank():
        for factor in np.linspace(1, min(4, min(counts) / (2 * a.dim)), sizes):
            for _ in range(1 if factor == 1 else draws):
                parts = [side.merged(_choose_groups(side, 1 / factor, rng)) for side in sides]
                inverse_sizes.append(sum(n / part.count for n, part in zip(counts, parts, strict=True)) / 2)
                distances.append(frechet_distance(*parts))
    return float(np.polyfit(inverse_sizes, distances, 1)[1])


def _draw_groups(statistics: FeatureStatistics, rng: np.random.Generator) -> torch.Tensor:
    """Draw groups with replacement, and return how often each was drawn: (G,)."""
    filled = statistics.filled.numpy()
    if len(filled) < 2:
        raise ValueError(f"a bootstrap needs 2 groups of samples or more, but there are {len(filled)}.")
    drawn = rng.choice(filled, len(filled))
    return torch.from_numpy(np.bincount(drawn, minlength=len(statistics.counts)))


def _choose_groups(statistics: FeatureStatistics, share: float, rng: np.random.Generator) -> torch.Tensor:
    """Choose a random share of the groups that have samples, each once: (G,)."""
    filled = statistics.filled.numpy()
    chosen = rng.choice(filled, max(1, round(share * len(filled))), replace=False)
    return torch.from_numpy(np.bincount(chosen, minlength=len(statistics.counts)))


# --- inception-style score ------------------------------------------------------------------------------------------


class ClassScore:
    """exp E KL(p(y|x) || p(y)): high where each clip is clearly of one class and all classes occur.

    The formula of the inception score (Salimans et al. 2016) with the probabilities of any network; name it, for
    instance `class_score_i3d`. UCF-101's "IS" uses a C3D finetuned on UCF-101 and is another number.

    `totals` (splits, K + 2), float64, holds for each split the sum of probabilities, the sum of negative entropies and
    the count. Several processes add theirs: `score.totals = reduce_sum(score.totals)`.

    Args:
        num_classes: K, 2 or more.
        splits: number of parts, chosen by `group_of` a sample's number, over which the score varies.
    """

    def __init__(self, num_classes: int, splits: int = 10) -> None:
        self.totals = torch.zeros(splits, num_classes + 2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, probabilities: torch.Tensor, numbers: Sequence[int]) -> None:
        """Add probabilities (N, K) of samples by their numbers.

        Raises:
            ValueError: if the shape does not fit, or a row is not a distribution.
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
        """Return mean and standard deviation of the splits' scores, each 1 to K. Raises `ValueError` if empty."""
        filled = self.totals[self.totals[:, -1] > 0]
        if not len(filled):
            raise ValueError("no probabilities to score: call update(probabilities, numbers) first.")
        shares = filled / filled[:, -1:]
        marginal = shares[:, :-2]
        scores = (shares[:, -2] - torch.xlogy(marginal, marginal).sum(dim=1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
