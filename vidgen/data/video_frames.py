"""Convert decoded frames to RGB: upright, with square pixels, transparent parts over black."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter
from PIL import Image

MIN_ASPECT_DEVIATION = 0.01  # relative; pixels closer to a square are not resized
MAX_PIXEL_ASPECT = 10  # ratio of a pixel's sides; a larger one is probably a damaged header
OBLIQUE_TANGENT = 0.02  # tangent of the largest deviation from quarter turns
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # by FFmpeg's numbers


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright: transpose, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False
    is_oblique: bool = False  # the rotation is not by quarter turns; the nearest quarter turn is used

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """An upright view of `pixels` (H, W, C)."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def describe(self) -> str:
        """What is unusual about it, as a sentence; empty for upright pictures."""
        if self.is_oblique:
            return "its display matrix turns it by an angle, and only quarter turns are applied"
        if (self.transpose + self.flip_x + self.flip_y) % 2:
            return "it is stored mirrored"
        return "it is stored rotated" if self.transpose or self.flip_x else ""


UPRIGHT = Orientation()


def read_orientation(frame: av.VideoFrame) -> Orientation:
    """The orientation given by the frame's display matrix.

    Call it for one frame of a stream only, as PyAV then keeps the frame until Python's garbage collector runs.
    """
    try:
        side_data = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    except ValueError:  # it has side data of a type that PyAV does not know
        turns = round(frame.rotation / 90) % 4
        return Orientation(turns % 2 == 1, flip_x=turns in (2, 3), flip_y=turns in (1, 2))
    return UPRIGHT if side_data is None else parse_display_matrix(np.frombuffer(bytes(side_data), np.int32))


def parse_display_matrix(matrix: np.ndarray) -> Orientation:
    """The orientation of a display matrix, as FFmpeg stores it: x' = a x + c y and y' = b x + d y, rows (a, b, u)."""
    a, b, _, c, d, *_ = (float(value) for value in matrix)
    straight, turned = abs(a) + abs(d), abs(b) + abs(c)
    if not straight and not turned:
        return UPRIGHT
    is_oblique = min(straight, turned) > OBLIQUE_TANGENT * max(straight, turned)
    if turned > straight:
        return Orientation(True, flip_x=c < 0, flip_y=b < 0, is_oblique=is_oblique)
    return Orientation(False, flip_x=a < 0, flip_y=d < 0, is_oblique=is_oblique)


def square_pixel_size(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """The displayed size: one side is enlarged so that pixels become square, as players do.

    `pixel_aspect` is width over height of a stored pixel. It is ignored if it is unknown, within 1 % of a square
    (encoders round it), or beyond 10:1.
    """
    aspect = float(pixel_aspect or 1)
    if abs(aspect - 1) < MIN_ASPECT_DEVIATION or not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        return width, height
    return (max(1, round(width * aspect)), height) if aspect > 1 else (width, max(1, round(height / aspect)))


@lru_cache
def has_alpha(pixel_format: str) -> bool:
    """Whether FFmpeg's pixel format of this name can hold transparency."""
    layout = av.VideoFormat(pixel_format)
    return layout.has_palette or any(component.is_alpha for component in layout.components)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether any pixel of the frame is at least partly transparent."""
    return has_alpha(frame.format.name) and bool((frame.reformat(format="rgba").to_ndarray()[..., 3] < 255).any())


def to_rgb(
    frame: av.VideoFrame,
    width: int,
    height: int,
    converter: VideoReformatter,
    *,
    orientation: Orientation = UPRIGHT,
    threads: int = 1,
) -> np.ndarray:
    """A decoded frame as contiguous uint8 (height, width, 3), upright, transparent parts over black.

    Args:
        width, height: size of the upright result. The frame is resized with antialiasing if its stored size differs:
            for square pixels, for the size of a reader, or where a stream changes its size midway.
        converter: keeps its conversion tables from frame to frame.
        threads: 0 is one per core; one is best for small frames.
    """
    if orientation.transpose:
        width, height = height, width
    if has_alpha(frame.format.name):
        pixels = converter.reformat(frame, format="rgba", threads=threads).to_ndarray().astype(np.uint16)
        pixels = ((pixels[..., :3] * pixels[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        pixels = converter.reformat(frame, format="rgb24", threads=threads).to_ndarray()
    if pixels.shape[:2] != (height, width):
        # swscale would be quicker, but costs up to 30 gray levels along colored edges.
        pixels = np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return np.ascontiguousarray(pixels if orientation is UPRIGHT else orientation.apply(pixels))
