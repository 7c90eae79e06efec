"""Scores of long videos by window, and their drift: the last quarter of the windows against the first window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from vidgen.metrics.detector import Detector
from vidgen.metrics.frechet import FeatureStatistics
from vidgen.metrics.fvd import measure_distance
from vidgen.metrics.stats import mean

from ..real.clips import to_float
from ..real.generation import compute_statistics
from ..sprites.classifier import SpriteClassifier
from .videos import cut_windows

BATCH = 32
MEASURES = {  # keys of the scores of videos, with headings
    "motion": "motion accuracy",
    "shape": "same shape as first window",
    "colors": "color drift of the shape (RGB L2)",
    "frame_color": "color drift of the frame (RGB L2)",
}
RISING = ("colors", "frame_color")  # drift raises these; it lowers the others


def score_videos(
    videos: torch.Tensor,
    labels: torch.Tensor,
    real: FeatureStatistics,
    classifier: SpriteClassifier,
    detector: Detector,
    length: int,
) -> dict[str, Any]:
    """Scores of videos by window.

    Args:
        videos: uint8 (N, 3, F, H, W).
        labels: (N,), their motions.
        real: statistics of the detector's features of real windows, of the same number as the videos.
        classifier: of clips of `length` frames that begin anywhere in a motion.
        detector: of the Fréchet distance.
        length: frames of a window.

    Returns:
        `windows`: for each window `first_frame`; of all videos, with 95 % bootstrap intervals, the fraction `motion`
        that moves as its class, the fraction `shape` with the shape of the first window, the RGB L2 distances (at most
        441) `colors` of the shape's colors and `frame_color` of the mean color to those of the first window; and
        `fvd`, the Fréchet distance to real windows. `drift`: for each measure the mean over the last quarter of the
        windows minus the first window, signed so that more is worse, with an interval over videos; for `fvd` without.
    """
    starts = cut_windows(videos.shape[2], length)
    values: dict[str, list[torch.Tensor]] = {name: [] for name in MEASURES}
    windows: list[dict[str, Any]] = []
    first = None
    for start in starts:
        pixels = videos[:, :, start : start + length]
        predicted = predict(pixels, classifier) | {"frame_color": pixels.double().mean(dim=(2, 3, 4))}
        first = predicted if first is None else first
        values["motion"].append((predicted["motion"] == labels).double())
        values["shape"].append((predicted["shape"] == first["shape"]).double())
        values["colors"].append((predicted["colors"] - first["colors"]).norm(dim=2).mean(dim=1))
        values["frame_color"].append((predicted["frame_color"] - first["frame_color"]).norm(dim=1))
        distance = measure_distance(compute_statistics(detector, pixels), real, len(pixels), len(pixels))
        scores = {name: asdict(mean(found[-1])) for name, found in values.items()}
        windows.append({"first_frame": start, **scores, "fvd": asdict(distance)})
    distances = [window["fvd"]["value"] for window in windows]
    drift = {name: asdict(mean(measure_drift(found, name in RISING))) for name, found in values.items()}
    return {"windows": windows, "drift": drift | {"fvd": measure_drift(distances, True)}}


def measure_drift(windows: Sequence[Any], rises: bool) -> Any:
    """The mean over the last quarter of the windows minus the first one, or the reverse if drift lowers the values."""
    last = windows[-max(len(windows) // 4, 1) :]
    difference = sum(last) / len(last) - windows[0]
    return difference if rises else -difference


def predict(pixels: torch.Tensor, classifier: SpriteClassifier) -> dict[str, torch.Tensor]:
    """The classifier's prediction for clips, uint8 (N, 3, T, H, W), a batch at a time."""
    batches = [classifier.predict(to_float(batch)) for batch in pixels.split(BATCH)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
