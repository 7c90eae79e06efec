"""The maximum mean discrepancy (MMD) between two sets of feature vectors, with a polynomial kernel of degree 2.

The kernel is that of JEDi (Luo et al. 2024, arXiv 2410.05203; oooolga/JEDi: videojedi/mmd_polynomial.py, degree 2,
coef0 0, gamma 1/D), for vectors of length D

    k(x, y) = (x . y / D)^2,

and the estimator is the unbiased one of the squared MMD (Gretton et al. 2012, "A kernel two-sample test", equation 3)

    MMD^2 = mean of k(x, x') + mean of k(y, y') - 2 mean of k(x, y),

with the means over pairs of different samples. It has no bias in the number of samples, assumes no Gaussian, and may
be negative by chance. JEDi's program computes the biased estimator, which also counts each sample with itself, and
prints 100 times its value.

Because (x . y)^2 is the inner product of the matrices x x^T and y y^T, sums over pairs are inner products of the sums
of x x^T, which `FeatureStatistics` keeps for each group of samples. Memory and time do not grow with pairs of samples.
Where a sample has several vectors, as one for each frame, pairs of vectors of one sample are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .frechet import FeatureStatistics


def mmd(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the unbiased estimate of the squared MMD of two sets; negative by chance for sets that are alike.

    Args:
        a, b: statistics of at least 2 samples each, of the same dimension D, in any number of groups.

    Raises:
        ValueError: for fewer than 2 samples, different dimensions, or statistics saved without `same_sample`.
    """
    sums = _KernelSums.of(a, b)
    return float(sums.estimate(np.ones((1, len(a.counts))), np.ones((1, len(b.counts))))[0])


def mmd_interval(
    a: FeatureStatistics, b: FeatureStatistics, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return a confidence interval of the squared MMD.

    Groups are drawn with replacement on both sides, and the interval is [d - q_hi, d - q_lo] with q the quantiles of
    d* - mean(d*) of the resampled estimates d*, as in `vidgen.metrics.frechet.bootstrap_interval`. Pairs of two copies
    of one group do not count, because they contain pairs of a sample with itself. For equal distributions, where the
    estimator is a degenerate U-statistic, the resampled estimates vary more than the estimate: the interval then is
    wider than its level requires.

    Args:
        level: of confidence, in (0, 1).
        resamples: number of resampled estimates.
        seed: random seed.

    Raises:
        ValueError: if a side has fewer than 2 groups with samples, or what `mmd` raises.
    """
    rng = np.random.default_rng(seed)
    value = mmd(a, b)
    estimates = _KernelSums.of(a, b).estimate(*(_draw_groups(side, resamples, rng) for side in (a, b)))
    estimates = estimates[np.isfinite(estimates)]  # without resamples in which a side is one sample, many times
    low, high = np.quantile(estimates - estimates.mean(), [(1 - level) / 2, (1 + level) / 2])
    return float(value - high), float(value - low)


@dataclass(frozen=True)
class _KernelSums:
    """Sums of the kernel over pairs of samples, by their groups.

    Attributes:
        a, b: of each side.
        cross: (G_a, G_b), sum over the pairs of a group of a and a group of b.
    """

    a: _Side
    b: _Side
    cross: np.ndarray

    @classmethod
    def of(cls, a: FeatureStatistics, b: FeatureStatistics) -> _KernelSums:
        if a.dim != b.dim:
            raise ValueError(f"cannot compare features of {a.dim} and {b.dim} dimensions.")
        moments_a, moments_b = _second_moments(a), _second_moments(b)
        return cls(_Side.of(a, moments_a), _Side.of(b, moments_b), (moments_a @ moments_b.T).numpy())

    def estimate(self, times_a: np.ndarray, times_b: np.ndarray) -> np.ndarray:
        """Return the estimates (R,) in which group g counts `times[r, g]` times; NaN where a side has no pairs."""
        vectors = (times_a @ self.a.counts) * (times_b @ self.b.counts)
        cross = np.einsum("rg,gh,rh->r", times_a, self.cross, times_b)
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.a.mean_kernel(times_a) + self.b.mean_kernel(times_b) - 2 * cross / vectors


@dataclass(frozen=True)
class _Side:
    """Sums over the pairs of different samples of one side.

    Attributes:
        counts: (G,), vectors in each group.
        kernel, pairs: (G, G), sum of the kernel, and number of pairs, between two groups; within a group without the
            pairs of one sample.
    """

    counts: np.ndarray
    kernel: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, statistics: FeatureStatistics, moments: torch.Tensor) -> _Side:
        same_sample = statistics.same_sample
        if same_sample.isnan().any():
            raise ValueError("these feature statistics were saved without `same_sample`: compute them again.")
        counts = statistics.counts.double()
        products, same_pairs = same_sample.unbind(dim=1)
        kernel = moments @ moments.T - torch.diag(products / statistics.dim**2)
        pairs = torch.outer(counts, counts) - torch.diag(same_pairs)
        if pairs.sum() <= 0:
            raise ValueError("an unbiased MMD needs 2 samples or more on both sides.")
        return cls(counts.numpy(), kernel.numpy(), pairs.numpy())

    def mean_kernel(self, times: np.ndarray) -> np.ndarray:
        """Return the mean of the kernel (R,) over pairs of different samples; copies of a group form no pairs."""
        sums = []
        for values in (self.kernel, self.pairs):
            within = np.diag(values)
            sums.append(np.einsum("rg,gh,rh->r", times, values - np.diag(within), times) + times @ within)
        return sums[0] / sums[1]


def _second_moments(statistics: FeatureStatistics) -> torch.Tensor:
    """Return for each group the sum of x x^T / D, flattened: (G, D * D)."""
    means, counts = statistics.means, statistics.counts.double()[:, None, None]
    return ((statistics.scatters + counts * means[:, :, None] * means[:, None, :]) / statistics.dim).flatten(1)


def _draw_groups(statistics: FeatureStatistics, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each group is drawn, with replacement, in each resample: (R, G)."""
    filled = statistics.filled.numpy()
    if len(filled) < 2:
        raise ValueError(f"a bootstrap needs 2 groups of samples or more, but there are {len(filled)}.")
    times = np.zeros((resamples, len(statistics.counts)))
    times[:, filled] = rng.multinomial(len(filled), np.full(len(filled), 1 / len(filled)), size=resamples)
    return times
