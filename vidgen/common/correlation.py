"""Regularized canonical correlation analysis (Hotelling 1936; Vinod 1976, "Canonical ridge")."""

from __future__ import annotations

import torch


def correlate(x: torch.Tensor, y: torch.Tensor, dim: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Project x and y to one space, where rows that belong together have similar directions.

    Args:
        x, y: centered, (N, D) and (N, V) of N pairs, float64.
        dim: canonical directions K, at most; no more than D or V are found.
        ridge: added to the covariances' diagonals, relative to their mean.

    Returns:
        Projections (D, K) and (V, K); directions are scaled by the correlation along them.
    """
    # Whiten both with a ridge, and find the directions of highest correlation.
    factors = [torch.linalg.cholesky(_covariance(z, ridge)) for z in (x, y)]
    cross = torch.linalg.solve_triangular(factors[0], x.T @ y / len(x), upper=False)
    cross = torch.linalg.solve_triangular(factors[1], cross.T, upper=False).T
    u, correlation, vh = torch.linalg.svd(cross, full_matrices=False)
    directions = [matrix[:, :dim] * correlation[:dim] for matrix in (u, vh.T)]
    return tuple(
        torch.linalg.solve_triangular(factor.T, direction, upper=True)
        for factor, direction in zip(factors, directions, strict=True)
    )


def _covariance(x: torch.Tensor, ridge: float) -> torch.Tensor:
    covariance = x.T @ x / len(x)
    return covariance + ridge * covariance.diag().mean() * torch.eye(len(covariance), dtype=x.dtype)
