"""Upload validation: files are checked before they cost time or memory, and refused with one sentence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..common.errors import UserError
from ..common.images import NOT_AN_IMAGE, read_image
from ..data.streams import FrameReader
from ..data.video import VideoError, probe, read_header

MAX_ASPECT = 8  # longer side over shorter side; several thinner videos side by side would be too small to see


@dataclass(frozen=True)
class UploadLimits:
    """Which files are accepted, and how videos are read.

    Attributes:
        megabytes: maximum size of a file.
        seconds: maximum length of a video.
        side: maximum longer side in pixels.
        short_side: short side in pixels to which larger videos are downscaled.
        fps: frame rate to which faster videos are reduced.
    """

    megabytes: float = 50
    seconds: float = 60
    side: int = 4096
    short_side: int = 256
    fps: float = 30


def open_video(path: str | os.PathLike, limits: UploadLimits, fps: float | None = None) -> FrameReader:
    """Open a video within the limits, with even sides and a short side of at most `limits.short_side`.

    Args:
        fps: frame rate at which it is read; by default the video's, at most `limits.fps`.

    Raises:
        UserError: for any other file.
    """
    path = Path(path)
    _check_bytes(path, limits)
    for read in (read_header, probe):  # check the header before a frame is decoded, then the actual frames
        info = read(path)
        _check_size(path, info.width, info.height, limits)
        if info.duration > limits.seconds:
            raise UserError(f"{path}: it lasts {info.duration:.1f} s; the maximum is {limits.seconds:g} s.")
    if fps is None and info.fps > limits.fps:
        fps = limits.fps
    return FrameReader(path, fps=fps, size=min(info.width, info.height, limits.short_side))


def open_image(path: str | os.PathLike, limits: UploadLimits) -> Image.Image:
    """Open an image within the limits, upright, as RGB.

    Raises:
        UserError: for any other file.
    """
    path = Path(path)
    _check_bytes(path, limits)
    return read_image(path, lambda width, height: _check_size(path, width, height, limits))


def open_image_or_video(
    path: str | os.PathLike, limits: UploadLimits, fps: float | None = None
) -> Image.Image | FrameReader:
    """Open a file by `open_image` or `open_video`, depending on its content, whatever its name.

    Raises:
        UserError: for any other file.
    """
    try:
        return open_image(path, limits)
    except UserError as error:
        if not isinstance(error.__cause__, UnidentifiedImageError):  # an image, but damaged or too large
            raise
    try:
        read_header(path)
    except VideoError as error:
        raise UserError(f"{path}: {NOT_AN_IMAGE}, and {error.reason}.") from error
    return open_video(path, limits, fps)


def _check_bytes(path: Path, limits: UploadLimits) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:  # uploads are deleted after a while, also those of a page that is still open
        raise UserError(f"{path}: the file has expired; upload it again.") from error
    if size == 0:
        raise UserError(f"{path}: the file is empty.")
    if size > limits.megabytes * 1e6:
        raise UserError(f"{path}: it has {size / 1e6:.0f} MB; the maximum is {limits.megabytes:g} MB.")


def _check_size(path: Path, width: int, height: int, limits: UploadLimits) -> None:
    if max(width, height) > limits.side:
        raise UserError(f"{path}: it has {width} x {height} pixels; the maximum is {limits.side} per side.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{path}: it has {width} x {height} pixels; the longer side may be at most {MAX_ASPECT} times the shorter."
        )
