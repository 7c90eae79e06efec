"""Whether videos longer than a clip hold together: what they show window by window, and whether they jump between."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .classifier import SpriteScorer
from .probes import mean, share

BATCH = 8


def seam_starts(frames: int, window: int, overlap: int) -> range:
    """The first frame that each window of a roll-out has in common with the one before; a last one that is cut counts.

    Args:
        frames: of the whole video.
        window, overlap: as in `rollout_scores`.
    """
    step = window - overlap
    return range(step, frames - overlap, step)  # a window is only made if it adds a frame


def rollout_scores(
    videos: torch.Tensor, labels: torch.Tensor, scorer: SpriteScorer, *, window: int, overlap: int
) -> dict[str, Any]:
    """How far roll-outs of sprites drift from their first window, and how they pass from one window to the next.

    Args:
        videos: (N, 3, F, H, W) in [-1, 1], from `pipelines.rollout.rollout`.
        labels: (N,), their classes of motion.
        scorer: reads what they show.
        window: frames T of a window.
        overlap: frames that two windows have in common.

    Returns:
        `windows`: for each whole window the `first_frame`, and scores: `motion`, the share that still moves as its
        class says; `shape`, the share that still shows the first window's shape; `colors`, how far they are off the
        first window's, a distance in RGB of levels of 255, so at most 441. A last window that is cut is too short to
        be read alone: the last entry then has the video's last T frames, which begin in the window before.
        `change`: the mean absolute change of a pixel, in levels of 255, from each frame to the next, (F - 1).
        `moved`: likewise how many pixels the shape's center moves. `seams`: what lies between two windows, the frames
        that fade and the change after them, against all other changes: ratios of `change` and `moved`, and the share
        of `jumps`, seams where a shape moves farther than anywhere in the first window of its video by a quarter and
        a pixel.
    """
    step, frames = window - overlap, videos.shape[2]
    last = max(frames - window, 0)
    starts = [*range(0, last, step), last]
    read = [scorer.read(videos[:, :, start : start + window]) for start in starts]
    first = read[0]
    windows = []
    for start, shown in zip(starts, read, strict=True):
        off = (shown["colors"] - first["colors"]).norm(dim=2).mean(dim=1)
        scores = {
            "motion": share(shown["motion"] == labels),
            "shape": share(shown["shape"] == first["shape"]),
            "colors": mean(off),
        }
        windows.append({"first_frame": start, **{name: asdict(score) for name, score in scores.items()}})
    change = torch.cat([v.diff(dim=2).abs().mean(dim=(1, 3, 4)) for v in videos.split(BATCH)]).double() * 127.5
    position = torch.cat([scorer.read(v)["position"] for v in videos.split(BATCH)])
    moved = position.diff(dim=1).norm(dim=2)
    between = torch.zeros(frames - 1, dtype=torch.bool)
    for start in seam_starts(frames, window, overlap):
        between[start - 1 : start + overlap] = True
    limit = 1.25 * moved[:, : step - 1].amax(dim=1, keepdim=True) + 1
    seams = {"frames": int(between.sum())}
    if between.any() and not between.all():
        seams |= {
            "change": (change[:, between].mean() / change[:, ~between].mean()).item(),
            "moved": (moved[:, between].mean() / moved[:, ~between].mean()).item(),
            "jumps": (moved[:, between] > limit).double().mean().item(),
        }
    return {
        "windows": windows,
        "change": change.mean(dim=0).tolist(),
        "moved": moved.mean(dim=0).tolist(),
        "seams": seams,
    }
