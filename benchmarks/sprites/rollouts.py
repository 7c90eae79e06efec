"""Consistency of roll-outs, which are videos longer than a clip: drift from window to window, and jumps at seams."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from vidgen.metrics.stats import mean, share

from .classifier import SpriteClassifier

BATCH = 8


def seam_starts(frames: int, window: int, overlap: int) -> range:
    """The first frame that each window of a roll-out shares with the previous one, including a cut last window.

    Args:
        frames: of the whole video.
        window, overlap: as in `rollout_scores`.
    """
    step = window - overlap
    return range(step, frames - overlap, step)  # every window adds a frame


def rollout_scores(
    videos: torch.Tensor, labels: torch.Tensor, classifier: SpriteClassifier, *, window: int, overlap: int
) -> dict[str, Any]:
    """How far roll-outs of sprites drift from their first window, and how smooth the seams between windows are.

    Args:
        videos: (N, 3, F, H, W) in [-1, 1], from `pipelines.rollout.rollout`.
        labels: (N,), their classes of motion.
        classifier: predicts the factors.
        window: frames T of a window.
        overlap: frames that two windows share.

    Returns:
        `windows`: for each whole window the `first_frame`, and scores: `motion`, the fraction that moves as the class
        specifies; `shape`, the fraction with the first window's shape; `colors`, the RGB L2 distance (at most 441) to
        the first window's. A cut last window is too short for the classifier: the last entry then covers the video's
        last T frames, which begin in the window before. `moved`: displacement of the shape's center, pixels per frame,
        (F - 1). `seams`: the steps between windows (blended frames and the step after them) relative to all others:
        the ratio of `moved`, and the fraction of `jumps`, steps that exceed the longest one of the video's
        first window by a quarter and a pixel.
    """
    # Factors of each window, compared with the first.
    step, frames = window - overlap, videos.shape[2]
    last = max(frames - window, 0)
    starts = [*range(0, last, step), last]
    predictions = [classifier.predict(videos[:, :, start : start + window]) for start in starts]
    first = predictions[0]
    windows = []
    for start, predicted in zip(starts, predictions, strict=True):
        scores = {
            "motion": share(predicted["motion"] == labels),
            "shape": share(predicted["shape"] == first["shape"]),
            "colors": mean((predicted["colors"] - first["colors"]).norm(dim=2).mean(dim=1)),
        }
        windows.append({"first_frame": start, **{name: asdict(score) for name, score in scores.items()}})

    # Steps between windows, compared with all others.
    position = torch.cat([classifier.predict(v)["position"] for v in videos.split(BATCH)])
    moved = position.diff(dim=1).norm(dim=2)
    between = torch.zeros(frames - 1, dtype=torch.bool)
    for start in seam_starts(frames, window, overlap):
        between[start - 1 : start + overlap] = True
    limit = 1.25 * moved[:, : step - 1].amax(dim=1, keepdim=True) + 1
    seams = {"frames": int(between.sum())}
    if between.any() and not between.all():
        seams |= {
            "moved": (moved[:, between].mean() / moved[:, ~between].mean()).item(),
            "jumps": (moved[:, between] > limit).double().mean().item(),
        }
    return {"windows": windows, "moved": moved.mean(dim=0).tolist(), "seams": seams}
