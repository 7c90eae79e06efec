"""Warping error of a video: how much its colors change along the optical flow (Lai et al. 2018).

"Learning Blind Video Temporal Consistency" (ECCV 2018, arXiv 1808.00449) defines for consecutive frames V_t, V_t+1

    E(V_t, V_t+1) = sum_i M_t(i) ||V_t(i) - W_t+1(i)||^2 / sum_i M_t(i),

where W_t+1 is frame t+1 warped to frame t by the optical flow, and M_t is 0 where a pixel is occluded. The paper's
program (phoenix104104/fast_blind_video_consistency: evaluate_WarpError.py) averages over the colors, in [0, 1]. A
pixel is occluded where the forward and backward flows disagree, or at a boundary of motion (Ruder et al. 2016,
"Artistic style transfer for videos"); here also where the flow leaves the frame.

The flow is OpenCV's dense inverse search (Kroeger et al. 2016, DIS, "medium"), of the video itself; the paper uses
FlowNet2. Values are therefore comparable with each other at one size and frame rate, and not with those of papers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..common.errors import UserError

MIN_SIDE = 12  # pixels; the smallest frames of OpenCV's DIS
MISSING = "it needs OpenCV: pip install opencv-python-headless, or 'vidgen[flow]'"


@dataclass(frozen=True)
class FlowMeasures:
    """Measures of a video along its optical flow.

    Attributes:
        warping_error: mean squared difference of the colors, in [0, 1], between a frame and the next one warped to it,
            over pixels that are not occluded, then over pairs of frames. A pair in which every pixel is occluded
            counts with all of them.
        occlusion: fraction of occluded pixels. Where it is much larger than that of real videos, frames do not
            continue each other, and the warping error covers only the pixels that happen to match.
    """

    warping_error: float
    occlusion: float


def has_optical_flow() -> bool:
    """Whether OpenCV is installed."""
    return importlib.util.find_spec("cv2") is not None


def measure_flow(frames: Iterable[np.ndarray]) -> FlowMeasures:
    """Measure a video in one pass; memory does not depend on its length.

    Args:
        frames: uint8 (H, W, 3), RGB, all of one size, at least 2 of 12 x 12 pixels or more.

    Raises:
        UserError: if there are fewer than 2 frames, they are smaller, or OpenCV is missing.
    """
    if not has_optical_flow():
        raise UserError(f"the warping error cannot be measured: {MISSING}.")
    measured = [_compare(first, second) for first, second in pairwise(frames)]
    if not measured:
        raise UserError("too short: 1 frame; 2 or more are needed for optical flow")
    return FlowMeasures(*np.mean(measured, axis=0, dtype=np.float64).tolist())


def estimate_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the motion in pixels (x, y) of every pixel from the first to the second frame, float32 (H, W, 2).

    Args:
        first, second: uint8 (H, W, 3), RGB, 12 x 12 pixels or more.

    Raises:
        UserError: if they are smaller.
    """
    import cv2

    if min(first.shape[:2]) < MIN_SIDE:
        raise UserError(f"too small: optical flow needs frames of {MIN_SIDE} x {MIN_SIDE} pixels or more")
    gray = (cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in (first, second))
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*gray, None)


def find_occlusion(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Return where pixels of the first frame have no counterpart in the second, bool (H, W).

    Args:
        forward: flow from the first to the second frame, (H, W, 2).
        backward: flow from the second to the first.
    """
    height, width = forward.shape[:2]
    places = _follow(forward)
    leaves = ((places < 0) | (places > (width - 1, height - 1))).any(axis=-1)
    returned = _warp(backward, places)
    squares = (forward**2).sum(axis=-1)
    disagrees = ((forward + returned) ** 2).sum(axis=-1) > 0.01 * (squares + (returned**2).sum(axis=-1)) + 0.5
    across = np.diff(forward, axis=1, append=forward[:, -1:])
    down = np.diff(forward, axis=0, append=forward[-1:])
    is_boundary = (across**2 + down**2).sum(axis=-1) > 0.01 * squares + 0.002
    return leaves | disagrees | is_boundary


def _compare(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The warping error and the occlusion of two frames."""
    forward = estimate_flow(first, second)
    occluded = find_occlusion(forward, estimate_flow(second, first))
    warped = _warp(second.astype(np.float32) / 255, _follow(forward))
    squares = ((first.astype(np.float32) / 255 - warped) ** 2).mean(axis=-1)
    visible = ~occluded if not occluded.all() else occluded
    return float(squares[visible].mean(dtype=np.float64)), float(occluded.mean())


def _follow(flow: np.ndarray) -> np.ndarray:
    """The places (x, y) to which the flow leads every pixel, float32 (H, W, 2)."""
    rows, columns = np.indices(flow.shape[:2], dtype=np.float32)
    return flow + np.stack([columns, rows], axis=-1)


def _warp(image: np.ndarray, places: np.ndarray) -> Any:
    """Values of an image (H, W, C) at places (H, W, 2), interpolated; beyond the border those of the border."""
    import cv2

    return cv2.remap(image, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
