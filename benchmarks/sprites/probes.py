"""Linear probes: what can be read from a latent by least squares alone (Alain and Bengio 2016).

A probe is fitted on some clips and scored on others. Every score carries the interval that a bootstrap over the test
clips gives it, and what it would be for a guess that looks at no clip. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vidgen.metrics.stats import Score, mean, ratio, share

SHRINKAGES = torch.logspace(-6, 4, 41, dtype=torch.float64)  # in mean squared lengths of the centered features


@dataclass(frozen=True)
class LinearMap:
    """What `Ridge.fit` found: `map(features)` is (M, K) float64 for features (M, D) of any float type and device.

    Attributes:
        mean: (D,), subtracted from the features.
        weights: (D, K).
        bias: (K,), the mean of the training targets.
        shrinkage: the one chosen, in mean squared lengths of the centered features.
    """

    mean: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    shrinkage: float

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return (features.double().to(self.mean.device) - self.mean) @ self.weights + self.bias


class Ridge:
    """Ridge regressions on one set of features, each with the shrinkage that leaving one clip out likes best.

    Solved in the dual form, so it costs N^3 for N clips, whatever the number of features. The error of predicting
    each clip from all the others is exact and needs no refitting (Allen's PRESS): residual / (1 - leverage). With
    more features than clips the residuals vanish, and these errors do not.

    Features keep their units: one that is tiny beside the others, as a latent that the KL term has put to sleep,
    is shrunk away.

    Args:
        features: (N, D), a row per training clip; any float type, on the device to compute on.

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
        """The map to targets (N, K), one shrinkage for all K: the one whose leave-one-out squared error is least.

        Raises:
            ValueError: if there are not as many targets as features.
        """
        if targets.ndim != 2 or len(targets) != len(self.centered):
            raise ValueError(f"targets must be ({len(self.centered)}, K), but have shape {tuple(targets.shape)}.")
        targets = targets.double().to(self.mean.device)
        bias = targets.mean(dim=0)
        rotated = self.vectors.T @ (targets - bias)
        if self.unit == 0:  # features that never change say nothing
            return LinearMap(self.mean, self.mean.new_zeros(len(self.mean), len(bias)), bias, float("inf"))
        errors = torch.stack([self._left_out_error(rotated, unit * self.unit) for unit in SHRINKAGES.tolist()])
        shrinkage = SHRINKAGES[errors.argmin().item()].item()
        dual = self.vectors @ (rotated / (self.eigenvalues + shrinkage * self.unit)[:, None])
        return LinearMap(self.mean, self.centered.T @ dual, bias, shrinkage)

    def _left_out_error(self, rotated: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
        """The mean squared error of each clip's targets as predicted from all the others; targets V^T (Y - mean)."""
        left = penalty / (self.eigenvalues + penalty)  # the share of each direction that is not fitted
        residuals = self.vectors @ (left[:, None] * rotated)
        unfitted = self.squares @ left - 1 / len(self.vectors)  # 1 - leverage; the mean costs 1 / N
        return (residuals / unfitted[:, None]).square().mean()


# --- scores --------------------------------------------------------------------------------------------------------


def probe_classes(
    ridge: Ridge, classes: torch.Tensor, test_features: torch.Tensor, test_classes: torch.Tensor
) -> Score:
    """The accuracy of the class whose one-hot target is predicted largest; chance is the commonest training class.

    Args:
        classes: (N,) int64 from 0, of the training clips.
        test_features, test_classes: (M, D) and (M,).
    """
    one_hot = F.one_hot(classes, int(max(classes.max(), test_classes.max())) + 1)
    predicted = ridge.fit(one_hot)(test_features).argmax(dim=1).cpu()
    commonest = one_hot.sum(dim=0).argmax().cpu()
    return share(predicted == test_classes.cpu(), chance=(test_classes.cpu() == commonest).double().mean().item())


def probe_points(
    ridge: Ridge, points: torch.Tensor, test_features: torch.Tensor, test_points: torch.Tensor
) -> dict[str, Score]:
    """How close points come that are regressed, such as a place in each frame or a color.

    Args:
        points: (N, P, d), P points of d coordinates for each training clip.
        test_features, test_points: (M, D) and (M, P, d).

    Returns:
        `r2`: the share of the variance over test clips that is explained, of all coordinates together, 1 at best;
        `distance`: the mean Euclidean distance, in the points' unit. Chance is the mean of the training clips.
    """
    fitted = ridge.fit(points.flatten(1))
    test_points = test_points.double().cpu()
    predicted = fitted(test_features).cpu().view_as(test_points)
    guess = fitted.bias.cpu().view_as(test_points[:1])
    around = (test_points - test_points.mean(dim=0)).square().sum(dim=(1, 2))

    def squared(of: torch.Tensor) -> torch.Tensor:
        return (of - test_points).square().sum(dim=(1, 2))

    def distance(of: torch.Tensor) -> torch.Tensor:
        return (of - test_points).norm(dim=2).mean(dim=1)

    unexplained = ratio(squared(predicted), around)
    chance = 1 - (squared(guess).sum() / around.sum()).item()
    return {
        "r2": Score(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low, chance),
        "distance": mean(distance(predicted), chance=distance(guess).mean().item()),
    }
