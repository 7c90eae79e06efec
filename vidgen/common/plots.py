"""Pictures of clips and of training: grids as PNG, moving grids as GIF or MP4, loss curves.

Clips are float tensors (B, C, T, H, W), RGB, in [-1, 1]. Small frames are enlarged pixel by pixel, so that they can
be seen. Every file is written aside and renamed, and no global Matplotlib state is touched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .io import atomic_write, to_uint8

FRAME_SIDE = 96  # pixels; the short side that enlarged frames reach, and beyond twice which large ones are shrunk
GAP = 6
INK, PAPER = (31, 41, 55), (255, 255, 255)
Cell = Image.Image | None


# --- pictures of clips -------------------------------------------------------------------------------------------


def clip_strip(clip: torch.Tensor, num_frames: int = 8) -> Image.Image:
    """`num_frames` frames of a clip side by side, first to last and evenly spaced (fewer if the clip is shorter).

    Args:
        clip: (C, T, H, W) or (1, C, T, H, W), in [-1, 1].

    Raises:
        ValueError: if it is something else or not finite.
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
    strip = Image.new("RGB", (count * (width + 2) - 2, height), PAPER)
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * (width + 2), 0))
    return strip


def component_grid(
    path: str | os.PathLike,
    originals: torch.Tensor,
    both: torch.Tensor,
    structure: torch.Tensor,
    dynamics: torch.Tensor,
    num_frames: int = 4,
) -> Path:
    """PNG of clips (rows) as original, decoded from both latents, structure only, and dynamics only (columns).

    All are (B, 3, T, H, W) in [-1, 1]; each cell shows `num_frames` frames. Raises `ValueError` if the shapes differ.
    """
    columns = {"original": originals, "both": both, "structure only": structure, "dynamics only": dynamics}
    return comparison_grid(path, columns, num_frames)


def comparison_grid(path: str | os.PathLike, columns: dict[str, torch.Tensor], num_frames: int = 4) -> Path:
    """PNG of clips (rows) in several versions, one a column under its name.

    All are (B, 3, T, H, W) in [-1, 1]; each cell shows `num_frames` frames. Raises `ValueError` if the shapes differ.
    """
    if len({clips.shape for clips in columns.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(clips.shape)}" for name, clips in columns.items())
        raise ValueError(f"a grid needs clips of one shape (B, 3, T, H, W), not {shapes}.")
    rows = [[clip_strip(clip, num_frames) for clip in row] for row in zip(*columns.values(), strict=True)]
    return _save_image(path, _sheet(rows, column_labels=list(columns)))


def reenactment_grid(
    path: str | os.PathLike,
    structure_clips: torch.Tensor,
    dynamics_clips: torch.Tensor,
    decoded: torch.Tensor,
    num_frames: int = 4,
) -> Path:
    """PNG of every structure with every dynamics: what one clip looks like, moving as another does.

    Args:
        structure_clips: (A, 3, T, H, W), the originals whose structure is used; they head the rows.
        dynamics_clips: (B, 3, T, H, W), the originals whose dynamics is used; they head the columns.
        decoded: (A, B, 3, T, H, W), decoded from the structure of row a and the dynamics of column b.
        num_frames: frames in each cell.

    Raises:
        ValueError: if the numbers of clips do not fit together.
    """
    expected = (len(structure_clips), len(dynamics_clips))
    if decoded.ndim != 6 or decoded.shape[:2] != expected:
        raise ValueError(
            f"decoded must be (A, B, 3, T, H, W) with A, B = {expected} as the structure and dynamics clips, "
            f"but has shape {tuple(decoded.shape)}."
        )
    head: list[Cell] = [None, *(clip_strip(clip, num_frames) for clip in dynamics_clips)]
    rows = [
        [clip_strip(original, num_frames), *(clip_strip(clip, num_frames) for clip in row)]
        for original, row in zip(structure_clips, decoded, strict=True)
    ]
    labels = ["", *(f"dynamics {b + 1}" for b in range(len(dynamics_clips)))]
    row_labels = ["", *(f"structure {a + 1}" for a in range(len(structure_clips)))]
    return _save_image(path, _sheet([head, *rows], column_labels=labels, row_labels=row_labels, header=True))


def class_grid(path: str | os.PathLike, clips: torch.Tensor, names: Sequence[str], num_frames: int = 8) -> Path:
    """PNG with one named row of frames per clip (N, 3, T, H, W); several clips may share a class.

    Raises `ValueError` if there are not as many `names` as clips.
    """
    if len(names) != len(clips):
        raise ValueError(f"a class grid needs one name per clip, not {len(names)} names for {len(clips)} clips.")
    return _save_image(path, _sheet([[clip_strip(clip, num_frames)] for clip in clips], row_labels=list(names)))


def save_clip_grid_video(
    path: str | os.PathLike,
    clips: torch.Tensor,
    fps: float,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
) -> Path:
    """A grid of clips that move together, as an endlessly looping `.gif` or an H.264 `.mp4`, by the name's ending.

    A GIF counts time in hundredths of a second (8 fps becomes 8.3) and shows 256 colors.

    Args:
        clips: (N, 3, T, H, W) in [-1, 1], filled in row by row.
        fps: frames per second.
        columns: clips in a row; about square by default.
        labels: N short texts, each above its clip.

    Raises:
        ValueError: for another ending, no clips, a rate that is not positive, or not as many labels as clips.
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
        frames.append(_sheet(rows, cell_labels=labels))
    if path.suffix.lower() == ".mp4":
        from ..data.video import write_video

        write_video(path, np.stack([np.asarray(frame) for frame in frames]), fps)
        return path
    frames = _in_256_colors(frames)
    with atomic_write(path) as unfinished:
        frames[0].save(unfinished, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return path


# --- the sheet: labeled cells in rows and columns ---------------------------------------------------------------


def _sheet(
    rows: list[list[Cell]],
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    cell_labels: Sequence[str] | None = None,
    header: bool = False,
) -> Image.Image:
    """Cells on white with texts above the columns, left of the rows, or above each cell; even width and height.

    All cells are as large as the first; None stays empty. `header` sets the first row and column apart.
    """
    cell_width, cell_height = next(cell.size for row in rows for cell in row if cell is not None)
    size = max(14, len(rows[0]) * cell_width // 75)  # wide sheets are looked at scaled down
    font = ImageFont.load_default(size=size)
    line = round(1.6 * size)
    left = GAP + max((math.ceil(font.getlength(text)) + 2 * GAP for text in row_labels), default=0)
    top = GAP + (line if column_labels else 0)
    above = line if cell_labels is not None else 0
    apart = 2 * GAP if header else 0

    def corner(r: int, c: int) -> tuple[int, int]:
        x = left + c * (cell_width + GAP) + (apart if c else 0)
        return x, top + r * (cell_height + above + GAP) + (apart if r else 0)

    width, height = corner(len(rows), len(rows[0]))
    sheet = Image.new("RGB", (width + width % 2, height + height % 2), PAPER)
    draw = ImageDraw.Draw(sheet)

    def write(x: float, y: float, text: str, room: float, anchor: str) -> None:
        while text and font.getlength(text) > room:
            text = text[:-2].rstrip() + "…" if len(text) > 2 else ""
        draw.text((x, y), text, INK, font, anchor)

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
                sheet.paste(cell, (x, y + above))
    return sheet


def _frame(clip: torch.Tensor, t: int) -> Image.Image:
    """Frame t of a clip (3, T, H, W), at a size that can be seen."""
    image = Image.fromarray(to_uint8(clip[:, t]).permute(1, 2, 0).cpu().contiguous().numpy())
    short = min(image.size)
    if short < FRAME_SIDE:
        factor = math.ceil(FRAME_SIDE / short)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if short > 2 * FRAME_SIDE:
        scale = 2 * FRAME_SIDE / short
        return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return image


def _in_256_colors(images: list[Image.Image]) -> list[Image.Image]:
    """Images of one size in one palette, ordered-dithered: gradients stay smooth and still parts do not flicker.

    The streamed GIFs of `vidgen.data.streams` have a palette for each frame: closer, but paper would not stay white.
    """
    pixels = np.stack([np.asarray(image) for image in images])
    palette = Image.fromarray(pixels.reshape(-1, *pixels.shape[2:])).quantize(256, dither=Image.Dither.NONE)
    _, height, width, _ = pixels.shape
    bayer = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) - 7.5
    pattern = np.tile(bayer, (height // 4 + 1, width // 4 + 1))[:height, :width, None]
    dithered = np.where(pixels == 255, 255, pixels + pattern).clip(0, 255).astype(np.uint8)  # paper stays white
    return [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in dithered]


def _save_image(path: str | os.PathLike, image: Image.Image) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a picture is written as .png.")
    with atomic_write(path) as unfinished:
        image.save(unfinished, optimize=True)
    return path


# --- curves ------------------------------------------------------------------------------------------------------


def read_curves(metrics_jsonl: str | os.PathLike) -> dict[str, dict[int, float]]:
    """Every scalar of a JSON-lines file with `step` in each line: {key: {step: value}}, steps ascending.

    A step written twice (a resumed run) keeps its last value; a last line cut off by a crash is left out, and so are
    values that are not finite numbers. Raises `FileNotFoundError`, or `ValueError` for a line that is not JSON.
    """
    path = Path(metrics_jsonl)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}.")
    lines = path.read_text(encoding="utf-8").splitlines()
    curves: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step.") from error
        for key, value in entry.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                curves.setdefault(key, {})[step] = float(value)
    return {key: dict(sorted(points.items())) for key, points in curves.items()}


def loss_curves(path: str | os.PathLike, metrics_jsonl: str | os.PathLike, keys: Sequence[str] | None = None) -> Path:
    """PNG with one panel per key of a run's `metrics.jsonl`: every value faint, a running mean over it.

    A panel is logarithmic where all values are positive and span a factor of 10 or more.

    Args:
        keys: which scalars, in this order; all of them by default.

    Raises:
        ValueError: if the file has none of the keys; otherwise as `read_curves`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    curves = read_curves(metrics_jsonl)
    shown = [key for key in (keys or curves) if key in curves]
    if not shown:
        raise ValueError(f"{metrics_jsonl} has no {' or '.join(keys) if keys else 'scalars'} to draw.")
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for i, key in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = list(curves[key]), list(curves[key].values())
        window = len(values) // 50
        many = window > 0
        axes.plot(steps, values, color="#2563eb", alpha=0.25 if many else 1, lw=1, marker="" if many else ".")
        if many:
            axes.plot(steps, _smoothed(values, window), color="#2563eb", lw=1.6)
        if min(values) > 0 and max(values) >= 10 * min(values):
            axes.set_yscale("log")
            few_decades = max(values) < 100 * min(values)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
        axes.set_title(key, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if i >= len(shown) - columns:
            axes.set_xlabel("step", fontsize=9)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return Path(path)


def _smoothed(values: list[float], window: int) -> np.ndarray:
    """The mean of each value and the `window` before and after it: centered, so nothing lags."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - window, 0), np.minimum(i + window + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def dataset_histograms(
    path: str | os.PathLike, durations: Sequence[float], sides: Sequence[int], rates: Sequence[float]
) -> Path:
    """PNG of how long a data set's videos are (seconds), how large (short side, pixels) and how fast (frames/s).

    Raises `ValueError` if there are none.
    """
    from matplotlib.figure import Figure

    if not len(durations):
        raise ValueError(f"{path}: there are no videos to draw histograms of.")
    figure = Figure(figsize=(12.6, 2.9), dpi=110, layout="constrained")
    labels = ("duration, seconds", "short side, pixels", "frames a second")
    for place, (values, label) in enumerate(zip((durations, sides, rates), labels, strict=True), start=1):
        axes = figure.add_subplot(1, 3, place)
        axes.hist(values, bins=min(40, max(1, len(set(values)))))
        axes.set_xlabel(label)
        axes.set_ylabel("videos")
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished)
    return Path(path)
