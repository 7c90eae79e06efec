"""Clips as images: pixel values, strips of frames, grids as PNG, moving grids as GIF or MP4.

Clips are float tensors (B, C, T, H, W), RGB, in [-1, 1]. Small frames are enlarged by whole factors to be visible.
Files are written atomically.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines.finite import NonFiniteError

from .errors import UserError
from .io import atomic_write
from .video_writing import write_video

FRAME_SIDE = 96  # pixels: a short side below it is enlarged, one above twice this is reduced
GAP = 6  # pixels between cells
TEXT_COLOR, BACKGROUND = (31, 41, 55), (255, 255, 255)
VISIBLE = 0.2  # standard deviation of pixels in [-1, 1] to which faint clips are raised
MAX_FACTOR = 10
Cell = Image.Image | None


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
NOT_AN_IMAGE = "it is not a whole PNG, JPEG, WebP or BMP image"


def read_image(
    path: str | os.PathLike, check_size: Callable[[int, int], object] = lambda width, height: None
) -> Image.Image:
    """Read an image of `IMAGE_FORMATS`, upright, as RGB.

    Args:
        path: of the file; its name does not matter.
        check_size: called with the width and height before pixels are decoded; it raises an error to refuse them.

    Raises:
        UserError: for any other file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                check_size(*image.size)
                return ImageOps.exif_transpose(image).convert("RGB")
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except Image.DecompressionBombError as error:  # Pillow's limit, which applies before the size is known
        raise UserError(f"{path}: it has far too many pixels.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: {NOT_AN_IMAGE}.") from error


def to_uint8(clip: torch.Tensor) -> torch.Tensor:
    """Convert values in [-1, 1] to pixels as files hold them: uint8 [0, 255], rounded and clamped; any shape.

    Raises:
        NonFiniteError: a ValueError, if a value is NaN or infinite.
    """
    if clip.numel() and not torch.stack(clip.detach().aminmax()).isfinite().all():
        raise NonFiniteError(
            f"a clip of shape {tuple(clip.shape)} holds NaN or infinite values; pixels must be finite."
        )
    return (clip.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


# --- Images of clips -------------------------------------------------------------------------------------------------


def clip_strip(clip: torch.Tensor, num_frames: int = 8) -> Image.Image:
    """Draw `num_frames` evenly spaced frames of a clip side by side, first to last (fewer if the clip is shorter).

    Args:
        clip: (C, T, H, W) or (1, C, T, H, W), in [-1, 1].

    Raises:
        ValueError: if the shape is another or a value is not finite.
    """
    if clip.ndim == 5 and len(clip) == 1:
        clip = clip[0]
    if clip.ndim != 4 or clip.shape[0] != 3 or num_frames < 1:
        raise ValueError(
            f"a strip needs one RGB clip (3, T, H, W) and 1 frame or more, not {tuple(clip.shape)} and {num_frames}."
        )
    count = min(num_frames, clip.shape[1])
    frames = [_frame(clip, t) for t in torch.linspace(0, clip.shape[1] - 1, count).round().int().tolist()]
    width, height = frames[0].size
    strip = Image.new("RGB", (count * (width + 2) - 2, height), BACKGROUND)
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * (width + 2), 0))
    return strip


def component_grid(
    path: str | os.PathLike,
    originals: torch.Tensor,
    both: torch.Tensor,
    structure: torch.Tensor,
    dynamics: torch.Tensor,
) -> Path:
    """`comparison_grid` of original clips and their decodings from both latents, structure only and dynamics only.

    Faint dynamics are drawn with more contrast, which the heading says.
    """
    visible, factor = raise_contrast(dynamics)
    heading = describe_contrast("dynamics only", factor)
    return comparison_grid(path, {"original": originals, "both": both, "structure only": structure, heading: visible})


def raise_contrast(clips: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Multiply faint clips (B, C, T, H, W) by a whole factor around the mean color of each, so that they are visible.

    Returns:
        The clips, and the factor: 1 if their standard deviation is more than half of `VISIBLE`, at most `MAX_FACTOR`.
    """
    difference = clips - clips.mean(dim=(2, 3, 4), keepdim=True)
    deviation = difference.std().item()
    factor = max(1, min(int(VISIBLE / deviation), MAX_FACTOR)) if deviation > 0 else 1  # NaN is reported when drawn
    return clips + (factor - 1) * difference, factor


def describe_contrast(name: str, factor: int) -> str:
    """The heading of clips drawn with a contrast."""
    return name if factor == 1 else f"{name}, contrast x {factor}"


def comparison_grid(path: str | os.PathLike, columns: dict[str, torch.Tensor], num_frames: int = 4) -> Path:
    """Write a PNG of clips (rows) in several versions (columns, headed by their names).

    All are (B, 3, T, H, W) in [-1, 1]; each cell shows `num_frames` frames. Raises `ValueError` if the shapes differ.
    """
    if len({clips.shape for clips in columns.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(clips.shape)}" for name, clips in columns.items())
        raise ValueError(f"a grid needs clips of one shape (B, 3, T, H, W), not {shapes}.")
    rows = [[clip_strip(clip, num_frames) for clip in row] for row in zip(*columns.values(), strict=True)]
    return _save_png(path, _draw_sheet(rows, column_labels=list(columns)))


def reenactment_grid(
    path: str | os.PathLike,
    structure_clips: torch.Tensor,
    dynamics_clips: torch.Tensor,
    decoded: torch.Tensor,
    num_frames: int = 4,
) -> Path:
    """Write a PNG of all pairs of a structure (rows) and a dynamics latent (columns), with the originals at the edges.

    Args:
        structure_clips: (A, 3, T, H, W), the originals of the structure latents.
        dynamics_clips: (B, 3, T, H, W), the originals of the dynamics latents.
        decoded: (A, B, 3, T, H, W), decoded from the structure of row a and the dynamics of column b.
        num_frames: frames in each cell.

    Raises:
        ValueError: if the numbers of clips do not match.
    """
    expected = (len(structure_clips), len(dynamics_clips))
    if decoded.ndim != 6 or decoded.shape[:2] != expected:
        raise ValueError(
            f"decoded must be (A, B, 3, T, H, W) with A, B = {expected} as the structure and dynamics clips, "
            f"but has shape {tuple(decoded.shape)}."
        )
    header: list[Cell] = [None, *(clip_strip(clip, num_frames) for clip in dynamics_clips)]
    rows = [
        [clip_strip(original, num_frames), *(clip_strip(clip, num_frames) for clip in row)]
        for original, row in zip(structure_clips, decoded, strict=True)
    ]
    labels = ["", *(f"dynamics {b + 1}" for b in range(len(dynamics_clips)))]
    row_labels = ["", *(f"structure {a + 1}" for a in range(len(structure_clips)))]
    return _save_png(path, _draw_sheet([header, *rows], labels, row_labels, header=True))


def class_grid(path: str | os.PathLike, clips: torch.Tensor, names: Sequence[str], num_frames: int = 8) -> Path:
    """Write a PNG with one labeled row of frames per clip (N, 3, T, H, W); several clips may share a name.

    Raises `ValueError` if the number of `names` is not that of the clips.
    """
    if len(names) != len(clips):
        raise ValueError(f"a class grid needs one name per clip, not {len(names)} names for {len(clips)} clips.")
    return _save_png(path, _draw_sheet([[clip_strip(clip, num_frames)] for clip in clips], row_labels=list(names)))


def save_clip_grid_video(
    path: str | os.PathLike,
    clips: torch.Tensor,
    fps: float,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a grid of moving clips as a looping `.gif` or an H.264 `.mp4`, by the suffix.

    A GIF stores durations in hundredths of a second (8 fps becomes 8.3) and has 256 colors.

    Args:
        clips: (N, 3, T, H, W) in [-1, 1], filled in row by row.
        fps: frames per second.
        columns: clips in a row; about square by default.
        labels: N short texts, each above its clip.

    Raises:
        ValueError: for another suffix, no clips, a rate that is not positive, or a wrong number of labels.
    """
    path = Path(path)
    if path.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"{path}: a moving grid is written as .gif or .mp4.")
    if clips.ndim != 5 or 0 in clips.shape or fps <= 0:
        raise ValueError(f"{path}: needs clips (N, 3, T, H, W) and fps > 0, not {tuple(clips.shape)} and {fps}.")
    if labels is not None and len(labels) != len(clips):
        raise ValueError(f"{path}: needs one label per clip, not {len(labels)} labels for {len(clips)} clips.")
    columns = columns or math.ceil(math.sqrt(len(clips)))
    frames = []
    for t in range(clips.shape[2]):
        cells: list[Cell] = [_frame(clip, t) for clip in clips]
        cells += [None] * (-len(cells) % columns)
        rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
        frames.append(_draw_sheet(rows, cell_labels=labels))
    if path.suffix.lower() == ".mp4":
        return write_video(path, np.stack([np.asarray(frame) for frame in frames]), fps)
    frames = _reduce_to_256_colors(frames)
    with atomic_write(path) as unfinished:
        frames[0].save(unfinished, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return path


# --- The sheet: labeled cells in rows and columns --------------------------------------------------------------------


def _draw_sheet(
    rows: list[list[Cell]],
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    cell_labels: Sequence[str] | None = None,
    header: bool = False,
) -> Image.Image:
    """Draw cells on white with labels above the columns, left of the rows, or above each cell.

    All cells have the size of the first; None leaves one empty. Width and height are even, as H.264 requires.
    `header` adds a gap after the first row and the first column.
    """
    # Measure the cells, the font and the margins.
    cell_width, cell_height = next(cell.size for row in rows for cell in row if cell is not None)
    size = max(14, len(rows[0]) * cell_width // 75)  # wide sheets are displayed at a smaller scale
    font = ImageFont.load_default(size=size)
    line = round(1.6 * size)
    left = GAP + max((math.ceil(font.getlength(text)) + 2 * GAP for text in row_labels), default=0)
    top = GAP + (line if column_labels else 0)
    label_height = line if cell_labels is not None else 0
    header_gap = 2 * GAP if header else 0

    def corner(r: int, c: int) -> tuple[int, int]:
        x = left + c * (cell_width + GAP) + (header_gap if c else 0)
        return x, top + r * (cell_height + label_height + GAP) + (header_gap if r else 0)

    width, height = corner(len(rows), len(rows[0]))
    sheet = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def write(x: float, y: float, text: str, room: float, anchor: str) -> None:
        while text and font.getlength(text) > room:
            text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
        draw.text((x, y), text, TEXT_COLOR, font, anchor)

    # Write the labels and paste the cells.
    for c, text in enumerate(column_labels):
        write(corner(0, c)[0] + cell_width / 2, GAP + line / 2, text, cell_width, "mm")
    for r, row in enumerate(rows):
        if row_labels:
            write(left - 2 * GAP, corner(r, 0)[1] + cell_height / 2, row_labels[r], left, "rm")
        for c, cell in enumerate(row):
            x, y = corner(r, c)
            if cell_labels is not None and r * len(row) + c < len(cell_labels):
                write(x + cell_width / 2, y + line / 2, cell_labels[r * len(row) + c], cell_width, "mm")
            if cell is not None:
                sheet.paste(cell, (x, y + label_height))
    return sheet


def _frame(clip: torch.Tensor, t: int) -> Image.Image:
    """Frame t of a clip (3, T, H, W), enlarged or reduced to a size that is easy to see."""
    image = Image.fromarray(to_uint8(clip[:, t]).permute(1, 2, 0).cpu().contiguous().numpy())
    short = min(image.size)
    if short < FRAME_SIDE:
        factor = math.ceil(FRAME_SIDE / short)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if short > 2 * FRAME_SIDE:
        scale = 2 * FRAME_SIDE / short
        return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def _reduce_to_256_colors(images: list[Image.Image]) -> list[Image.Image]:
    """Quantize images of one size to one palette with ordered dithering, so that still parts do not flicker.

    The streamed GIFs of `vidgen.data.streams` have a palette for each frame, which would tint a white background.
    """
    pixels = np.stack([np.asarray(image) for image in images])
    palette = Image.fromarray(pixels.reshape(-1, *pixels.shape[2:])).quantize(256, dither=Image.Dither.NONE)
    _, height, width, _ = pixels.shape
    bayer = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5
    pattern = np.tile(bayer, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    dithered = np.where(pixels == 255, 255, pixels + pattern).clip(0, 255).astype(np.uint8)  # white stays white
    return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in dithered]


def _save_png(path: str | os.PathLike, image: Image.Image) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: an image is written as .png.")
    with atomic_write(path) as unfinished:
        image.save(unfinished)  # optimize=True takes ten times as long for a few percent
    return path
