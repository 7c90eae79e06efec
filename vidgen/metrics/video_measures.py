"""Measures of a single video that need no network and no reference: flicker, motion energy, sharpness and loop seam.

Each is in gray levels (0 to 255) of the luma, and depends on the size and the frame rate of the video. None is good or
bad by itself: a value is compared with that of real videos of the same size and rate
(`vidgen.metrics.video_evaluation`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..common.errors import UserError

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
COARSE_SIDE = 8  # pixels; the short side of the frames in which motion is measured
MIN_FRAMES = 3


@dataclass(frozen=True)
class VideoMeasures:
    """Measures of a video, in gray levels.

    Attributes:
        flicker: mean absolute difference between a frame and the mean of its two neighbors. Steady motion has little,
            since it is continued in the next frame; brightness that goes up and down has much.
        motion_energy: mean absolute difference between consecutive frames after averaging to a short side of 8
            pixels, so that fine detail, and a lack of it, hardly counts.
        loop_seam: the same difference between the last and the first frame; in a seamless loop it is about the motion
            energy.
        sharpness: mean magnitude of the spatial gradient; independent of the order of the frames.
    """

    flicker: float
    motion_energy: float
    loop_seam: float
    sharpness: float


MEASURES = tuple(VideoMeasures.__dataclass_fields__)


def measure_video(frames: Iterable[np.ndarray]) -> VideoMeasures:
    """Measure a video in one pass; memory does not depend on its length.

    Args:
        frames: uint8 (H, W, 3), RGB, all of one size, at least 3 of 2 x 2 pixels or more.

    Raises:
        UserError: if there are fewer than 3 frames.
    """
    flicker, motion, sharpness = [], [], []
    first = coarse = None
    recent: list[np.ndarray] = []
    for frame in frames:
        luma = frame @ LUMA
        previous, coarse = coarse, average_to_coarse(luma)
        first = coarse if first is None else first
        sharpness.append(_gradient(luma))
        if previous is not None:
            motion.append(np.abs(coarse - previous).mean())
        recent = [*recent[-2:], luma]
        if len(recent) == 3:
            flicker.append(np.abs(recent[1] - (recent[0] + recent[2]) / 2).mean())
    if len(sharpness) < MIN_FRAMES:
        raise UserError(f"too short: {len(sharpness)} frames; {MIN_FRAMES} or more are needed")
    seam = np.abs(coarse - first).mean()
    return VideoMeasures(*(float(np.mean(values, dtype=np.float64)) for values in (flicker, motion, seam, sharpness)))


def average_to_coarse(luma: np.ndarray) -> np.ndarray:
    """Average a frame (H, W) over equal cells, `COARSE_SIDE` on the short side; smaller frames are unchanged."""
    side = min(luma.shape)
    if side <= COARSE_SIDE:
        return luma
    for axis in (0, 1):
        size = luma.shape[axis]
        edges = np.linspace(0, size, round(size * COARSE_SIDE / side) + 1).round().astype(int)
        counts = np.diff(edges)
        luma = np.add.reduceat(luma, edges[:-1], axis=axis) / np.expand_dims(counts, 1 - axis)
    return luma


def _gradient(luma: np.ndarray) -> float:
    down, across = np.diff(luma, axis=0)[:, :-1], np.diff(luma, axis=1)[:-1]
    return float(np.hypot(down, across).mean())
