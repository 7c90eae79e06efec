"""What strangers upload: looked at before it costs time or memory, and refused in one sentence."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..common.errors import UserError
from ..data.streams import FrameReader
from ..data.video import VideoError, probe, read_header

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_ELONGATED = 8  # the longer side over the shorter; of several thinner ones in a row little could be seen


@dataclass(frozen=True)
class UploadLimits:
    """What is taken, and how it is read.

    Attributes:
        megabytes: of a file, at most.
        seconds: of a video, at most.
        side: in pixels, of the longer side, at most.
        short_side: in pixels; what is larger is scaled down to it.
        fps: what has more frames a second is read at this rate.
    """

    megabytes: float = 50
    seconds: float = 60
    side: int = 4096
    short_side: int = 256
    fps: float = 30


def open_video(path: str | os.PathLike, limits: UploadLimits, fps: float | None = None) -> FrameReader:
    """A video within the limits, its sides even and its short one at most `limits.short_side`.

    `fps`: read it at this rate; by default at its own, `limits.fps` at most.

    Raises:
        UserError: for any other file.
    """
    path = Path(path)
    _check_bytes(path, limits)
    for read in (read_header, probe):  # what the header says, before a frame is decoded; then what is there
        found = read(path)
        _check_size(path, found.width, found.height, limits)
        if found.duration > limits.seconds:
            raise UserError(f"{path}: it lasts {found.duration:.1f} s, and at most {limits.seconds:g} s are taken.")
    if fps is None and found.fps > limits.fps:
        fps = limits.fps
    return FrameReader(path, fps=fps, size=min(found.width, found.height, limits.short_side))


def open_image(path: str | os.PathLike, limits: UploadLimits) -> Image.Image:
    """A still image within the limits, upright, RGB.

    Raises:
        UserError: for any other file.
    """
    path = Path(path)
    _check_bytes(path, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, which are refused below
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                _check_size(path, *image.size, limits)
                return ImageOps.exif_transpose(image).convert("RGB")
    except UserError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, met before the size is known
        raise UserError(f"{path}: at most {limits.side} pixels a side are taken, and it has many more.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: it is not a whole PNG, JPEG, WebP or BMP image.") from error


def open_image_or_video(
    path: str | os.PathLike, limits: UploadLimits, fps: float | None = None
) -> Image.Image | FrameReader:
    """As `open_image` or `open_video`, whichever the content is for, whatever the name.

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
        raise UserError(f"{path}: it is not a whole PNG, JPEG, WebP or BMP image, and {error.reason}.") from error
    return open_video(path, limits, fps)


def _check_bytes(path: Path, limits: UploadLimits) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:  # uploads go after a while, also from under a page that is still open
        raise UserError(f"{path}: the file is no longer kept, and must be uploaded again.") from error
    if size == 0:
        raise UserError(f"{path}: the file is empty.")
    if size > limits.megabytes * 1e6:
        raise UserError(f"{path}: it has {size / 1e6:.0f} MB, and at most {limits.megabytes:g} MB are taken.")


def _check_size(path: Path, width: int, height: int, limits: UploadLimits) -> None:
    if max(width, height) > limits.side:
        raise UserError(f"{path}: it has {width} x {height} pixels, and at most {limits.side} a side are taken.")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise UserError(
            f"{path}: it has {width} x {height} pixels, and its longer side may be at most {MOST_ELONGATED} times "
            "the shorter."
        )
