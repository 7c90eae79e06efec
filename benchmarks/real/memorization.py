"""Whether generated clips are copies of training clips: distances to the nearest training clip."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from vidgen.metrics.stats import Score, share

GRID = (4, 12, 18)  # frames and pixels that clips are averaged to; a clip has 2,592 values
PERCENTILE = 0.01


def copy_features(clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] averaged to `GRID`, (B, D): Euclidean distances are root mean square
    differences of these averages in 8-bit levels."""
    features = F.adaptive_avg_pool3d(clips.float().clamp(-1, 1), GRID).flatten(1)
    return 127.5 * features / features.shape[1] ** 0.5


def nearest_distances(features: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """Distance of each row (N, D) to the nearest of the training rows (M, D): (N,)."""
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")
    return torch.cat([torch.cdist(part, training, **exact).amin(dim=1) for part in features.split(64)])


def measure_memorization(generated: torch.Tensor, test: torch.Tensor, training: torch.Tensor) -> dict[str, Any]:
    """How much nearer to training clips generated clips are than test clips.

    Args:
        generated, test, training: `copy_features` of clips, (N, D), (M, D), (K, D).

    Returns:
        `threshold`: the 1st percentile of the test clips' distances; `copies`: the share of generated clips that are
        nearer, with `test` the same of test clips; `median` of both distances.
    """
    distances = {name: nearest_distances(x, training) for name, x in (("generated", generated), ("test", test))}
    threshold = distances["test"].double().quantile(PERCENTILE).item()
    shares: dict[str, Score] = {name: share(values < threshold) for name, values in distances.items()}
    return {
        "threshold": threshold,
        "median": {name: values.double().median().item() for name, values in distances.items()},
        "copies": {name: vars(score) for name, score in shares.items()},
    }
