"""Writing of mp4 files, atomically."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from .errors import UserError
from .io import atomic_write, file_url

HIGHEST_RATE = 1000  # frames/s; a typing error could otherwise request gigabytes of frames


def write_video(
    path: str | os.PathLike, frames: np.ndarray | torch.Tensor, fps: float | Fraction, *, crf: int = 16
) -> Path:
    """Write `frames` as an H.264 (yuv420p) mp4 of exactly this size, frame count and rate.

    Args:
        frames: uint8 (T, H, W, 3), RGB. H and W must be even, because yuv420p halves the color planes; yuv444p does
            not play in browsers.
        fps: frames per second.
        crf: x264's quality; lower is better.

    Raises:
        UserError: for frames or a rate that cannot be written.
    """
    path = Path(path)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise UserError(f"{path}: frames must be uint8 of shape (T, H, W, 3), got {frames.dtype} {frames.shape}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UserError(f"{path}: H.264 with yuv420p needs an even height and width, got {height}x{width}")
    # Only with one thread do equal frames give equal bytes.
    with mp4_file(path, fps=fps, width=width, height=height, crf=crf, threads=1) as add:
        for frame in frames:
            add(frame)
    return path


@contextmanager
def mp4_file(
    path: str | os.PathLike, *, fps: float | Fraction, width: int, height: int, crf: int = 16, threads: int = 0
) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that adds a frame, uint8 (H, W, 3), RGB, to an H.264 mp4, which is written atomically.

    The pixel format is yuv420p if both sides are even; otherwise yuv444p, which browsers do not play.

    Args:
        crf: x264's quality; lower is better.
        threads: 0 is one per core.
    """
    with (
        atomic_write(path) as unfinished,
        av.open(file_url(unfinished), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # x264's macroblock tree is not deterministic on small frames.
        options = {"crf": str(crf), "threads": str(threads), "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=exact_rate(fps, path), options=options)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if width % 2 or height % 2 else "yuv420p"
        # State the matrix that PyAV converts with, BT.601; players assume BT.709 for large frames.
        colors = stream.codec_context
        colors.color_range, colors.colorspace, colors.color_primaries, colors.color_trc = 1, 6, 6, 6

        def add(frame: np.ndarray) -> None:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

        yield add
        container.mux(stream.encode())


def exact_rate(fps: float | Fraction, path: str | os.PathLike) -> Fraction:
    """The simplest fraction near a frame rate: 2997/100 for 29.97, 30000/1001 for the float of it.

    Raises `UserError`, naming `path`, if it is not a positive number.
    """
    if not 0 < fps < math.inf:
        raise UserError(f"{path}: fps must be positive, got {fps}")
    if fps > HIGHEST_RATE:
        raise UserError(f"{path}: fps must be at most {HIGHEST_RATE}, got {fps:g}")
    exact = fps if isinstance(fps, Fraction) else Fraction(float(fps))
    return exact.limit_denominator(1001) if exact > 1 else 1 / (1 / exact).limit_denominator(1001)
