"""Linear probes: what least squares can predict from a latent (Alain and Bengio 2016).

A probe is fitted on some clips and scored on others. Every score carries a bootstrap interval over the test clips and
chance, the score of the best constant guess. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vidgen.metrics.stats import Score, mean, ratio, share

SHRINKAGES = torch.logspace(-6, 4, 41, dtype=torch.float64)  # in mean squared norms of the centered features


@dataclass(frozen=True)
class LinearMap:
    """The result of `Ridge.fit`: maps features (M, D) of any float type and device to (M, K) float64.

    Attributes:
        mean: (D,), subtracted from the features.
        weights: (D, K).
        bias: (K,), the mean of the training targets.
        shrinkage: the selected one, in mean squared norms of the centered features.
    """

    mean: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    shrinkage: float

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features.double().to(self.mean.device) - self.mean) @ self.weights + self.bias


class Ridge:
    """Ridge regressions on one set of features; leave-one-out cross-validation selects each shrinkage.

    Solved in the dual form, so the cost is N^3 for N clips and any number of features. The leave-one-out error is
    exact and needs no refitting (Allen's PRESS): residual / (1 - leverage). With more features than clips the
    residuals vanish, but these errors do not.

    Features keep their scale, so that tiny ones, such as latent channels that the KL term has collapsed, are ignored.

    Args:
        features: (N, D), one row per training clip; any float type, on the device to compute on.

    Raises:
        ValueError: for fewer than 3 rows, another number of axes, or values that are not finite.
    """

    def __init__(self, features: torch.Tensor) -> None:
        if features.ndim != 2 or len(features) < 3:
            raise ValueError(f"a probe needs features (N, D) of 3 clips or more, not {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise ValueError("the features hold NaN or infinite values.")
        features = features.double()
        self.mean = features.mean(dim=0)
        self.centered = features - self.mean
        gram = self.centered @ self.centered.T
        self.unit = gram.diagonal().mean()
        eigenvalues, self.vectors = torch.linalg.eigh(gram)
        self.eigenvalues = eigenvalues.clamp(min=0)
        self.squares = self.vectors.square()

    def fit(self, targets: torch.Tensor) -> LinearMap:
        """Fit targets (N, K) with one shrinkage for all K, the one with the lowest leave-one-out squared error.

        Raises:
            ValueError: if the number of targets differs from the number of features.
        """
        if targets.ndim != 2 or len(targets) != len(self.centered):
            raise ValueError(f"targets must be ({len(self.centered)}, K), but have shape {tuple(targets.shape)}.")
        targets = targets.double().to(self.mean.device)
        bias = targets.mean(dim=0)
        rotated = self.vectors.T @ (targets - bias)
        if self.unit == 0:  # constant features predict the mean
            return LinearMap(self.mean, self.mean.new_zeros(len(self.mean), len(bias)), bias, float("inf"))
        errors = torch.stack([self._leave_one_out_error(rotated, s * self.unit) for s in SHRINKAGES.tolist()])
        shrinkage = SHRINKAGES[errors.argmin().item()].item()
        dual = self.vectors @ (rotated / (self.eigenvalues + shrinkage * self.unit)[:, None])
        return LinearMap(self.mean, self.centered.T @ dual, bias, shrinkage)

    def _leave_one_out_error(self, rotated: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        """Mean squared error of each clip's targets as predicted from all others; `rotated` is V^T (Y - mean)."""
        unfitted = penalty / (self.eigenvalues + penalty)  # fraction of each direction
        residuals = self.vectors @ (unfitted[:, None] * rotated)
        one_minus_leverage = self.squares @ unfitted - 1 / len(self.vectors)  # the mean costs 1 / N
        return (residuals / one_minus_leverage[:, None]).square().mean()


# --- scores --------------------------------------------------------------------------------------------------------


def probe_classes(
    ridge: Ridge, classes: torch.Tensor, test_features: torch.Tensor, test_classes: torch.Tensor
) -> Score:
    """Accuracy of the class with the largest predicted one-hot value; chance is the most common training class.

    Args:
        classes: (N,) int64 from 0, of the training clips.
        test_features, test_classes: (M, D) and (M,).
    """
    one_hot = F.one_hot(classes, int(max(classes.max(), test_classes.max())) + 1)
    predicted = ridge.fit(one_hot)(test_features).argmax(dim=1).cpu()
    most_common = one_hot.sum(dim=0).argmax().cpu()
    return share(predicted == test_classes.cpu(), chance=(test_classes.cpu() == most_common).double().mean().item())


def probe_points(
    ridge: Ridge, points: torch.Tensor, test_features: torch.Tensor, test_points: torch.Tensor
) -> dict[str, Score]:
    """Regression of points, such as a position in each frame or a color.

    Args:
        points: (N, P, d), P points of d coordinates for each training clip.
        test_features, test_points: (M, D) and (M, P, d).

    Returns:
        `r2`: explained variance over test clips, of all coordinates together, 1 at best; `distance`: mean Euclidean
        distance, in the points' unit. Chance is the mean of the training clips.
    """
    fitted = ridge.fit(points.flatten(1))
    test_points = test_points.double().cpu()
    predicted = fitted(test_features).cpu().view_as(test_points)
    guess = fitted.bias.cpu().view_as(test_points[:1])
    variance = (test_points - test_points.mean(dim=0)).square().sum(dim=(1, 2))

    def squared_error(estimate: torch.Tensor) -> torch.Tensor:
        return (estimate - test_points).square().sum(dim=(1, 2))

    def distance(estimate: torch.Tensor) -> torch.Tensor:
        return (estimate - test_points).norm(dim=2).mean(dim=1)

    unexplained = ratio(squared_error(predicted), variance)
    chance = 1 - (squared_error(guess).sum() / variance.sum()).item()
    return {
        "r2": Score(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low, chance),
        "distance": mean(distance(predicted), chance=distance(guess).mean().item()),
    }
