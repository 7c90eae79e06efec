"""The Fréchet distance between two sets of feature vectors, and the statistics it is computed from.

Heusel et al., "GANs trained by a two time-scale update rule" (2017): the sets are taken as Gaussians, and

    d^2 = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1^1/2 S2 S1^1/2).

With I3D features of clips this is the Fréchet video distance. Everything here is float64 on the CPU.
"""

from __future__ import annotations

import os
import warnings

import torch

from ..files import written_aside


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
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (N, {self.dim}), but have shape {tuple(features.shape)}.")
        features = features.detach().cpu().double()
        broken = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
        if len(broken):
            raise ValueError(
                f"{len(broken)} of {len(features)} feature vectors are not finite, the first in row {broken[0]}."
            )
        if len(features):
            mean = features.mean(dim=0)
            centred = features - mean
            self._fold(len(features), mean, centred.T @ centred)

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

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`count` (int64, scalar), `mean` and `scatter`: what `load_state_dict` takes and `save` writes."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> FeatureStatistics:
        """The inverse of `state_dict`. Raises `ValueError` for missing keys, other shapes, or non-finite values."""
        missing = {"count", "mean", "scatter"} - state.keys()
        if missing:
            raise ValueError(f"feature statistics need count, mean and scatter, but {sorted(missing)} are missing.")
        mean, scatter = state["mean"].double(), state["scatter"].double()
        if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or state["count"].numel() != 1:
            raise ValueError(
                "feature statistics need a scalar count, a mean (D,) and a scatter (D, D), but have shapes "
                f"{tuple(state['count'].shape)}, {tuple(mean.shape)} and {tuple(scatter.shape)}."
            )
        if not (torch.isfinite(mean).all() and torch.isfinite(scatter).all()):
            raise ValueError("feature statistics hold NaN or infinite values.")
        statistics = cls(len(mean))
        statistics.count, statistics.mean, statistics.scatter = int(state["count"]), mean, scatter
        return statistics

    def save(self, path: str | os.PathLike) -> None:
        """Write a `.safetensors` file, whole or not at all."""
        from safetensors.torch import save_file

        with written_aside(path) as unfinished:
            save_file({key: value.contiguous() for key, value in self.state_dict().items()}, unfinished)

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureStatistics:
        """Read what `save` wrote. Raises `FileNotFoundError`, or `ValueError` for a file that is something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not os.path.isfile(path):
            raise FileNotFoundError(f"no feature statistics at {path}.")
        try:
            return cls.from_state_dict(load_file(path))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is not a file of feature statistics: {error}") from error


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


def real_vs_real(features: torch.Tensor, seed: int = 0) -> float:
    """The Fréchet distance between two random halves of one set of features (N, D): the noise level of a number.

    The distance falls as sets grow, so to judge n generated clips against n real ones, pass features of 2n real ones.
    Raises `ValueError` for fewer than 4 vectors, and what `frechet_distance` and `FeatureStatistics` raise.
    """
    if features.ndim != 2 or len(features) < 4:
        raise ValueError(f"real-vs-real needs features (N, D) with N >= 4, but got shape {tuple(features.shape)}.")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(features.device)
    halves = features[order].chunk(2)
    return frechet_distance(*(FeatureStatistics.of(half) for half in halves))
