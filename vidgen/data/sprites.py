"""Sprites: a small labeled set of procedurally drawn videos, for the demo and the tests.

One large shape (two in `swap`), in a bright color and its tint, moves over a dark gradient of another color. The
appearance, the "structure", is drawn independently of the motion, which is the class; all factors are stored beside
each clip. Few factors are random, so that a model can learn them in minutes.

Lengths are in pixels (within `motion_parameters`, in frame widths), y points down, angles are in degrees and turn
clockwise on the screen.
"""

from __future__ import annotations

import colorsys
import csv
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from ..common.io import atomic_write
from ..common.progress import progress
from ..common.video_writing import write_video

MOTIONS = ("slide", "bounce", "orbit", "spin", "zoom", "shake", "swap", "still")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("split", "stripes")
PERIOD = 16  # frames after which the motions of a dataset of longer clips repeat


# --- factors ---------------------------------------------------------------------------------------------------------


def sample_factors(
    rng: np.random.Generator,
    motion: str,
    *,
    resolution: int = 64,
    num_frames: int = 16,
    fps: float = 8,
    period: int | None = None,
) -> dict:
    """Sample the factors of a clip for `render_sprite`, in JSON types, as a pure function of `rng`'s state.

    The appearance is sampled before the motion, from the same random numbers for every class. Per shape: `kind`,
    `size` (diameter), `colors` (two, RGB in [0, 1]), `texture`, and for each frame `centers` (x, y), `angles`,
    `scales`. A motion takes `period` frames, by default all, and is then repeated (`_repeat`). Raises `UserError` for
    an unknown motion.
    """
    if motion not in MOTIONS:
        raise UserError(f"unknown motion {motion!r}, expected one of {', '.join(MOTIONS)}")
    background = _sample_background(rng)
    shapes = [_sample_shape(rng, resolution) for _ in range(2)]
    period = num_frames if period is None else period
    parameters, tracks = _MOTIONS[motion](rng, [s["size"] / resolution for s in shapes], period)
    tracks = _repeat(motion, tracks, period, num_frames)
    for shape, (centers, angles, scales) in zip(shapes, tracks, strict=False):
        shape["centers"] = np.round(centers * resolution, 3).tolist()
        shape["angles"] = np.round(angles + shape.pop("tilt"), 3).tolist()
        shape["scales"] = np.round(scales, 4).tolist()
    return {
        "motion": motion,
        "motion_parameters": parameters,
        "resolution": resolution,
        "num_frames": num_frames,
        "fps": fps,
        "background": background,
        "shapes": shapes[: len(tracks)],
    }


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(float(rng.uniform(low, high)), 4)


def _sample_background(rng: np.random.Generator) -> dict:
    hue, saturation = _uniform(rng, 0, 1), _uniform(rng, 0.2, 0.5)
    values = _uniform(rng, 0.1, 0.2), _uniform(rng, 0.4, 0.55)
    return {
        "colors": [_rgb(hue, saturation, value) for value in values],
        "angle": _uniform(rng, 0, 360),
        "wave": {
            "amplitude": _uniform(rng, 0.02, 0.04),
            "angle": _uniform(rng, 0, 360),
            "cycles": _uniform(rng, 0.8, 1.8),  # across the frame
            "phase": _uniform(rng, 0, 360),
        },
    }


def _sample_shape(rng: np.random.Generator, resolution: int) -> dict:
    kind, size = str(rng.choice(SHAPES)), _uniform(rng, 0.32, 0.46) * resolution
    hue, saturation, value = _uniform(rng, 0, 1), _uniform(rng, 0.8, 1), _uniform(rng, 0.85, 1)
    return {
        "kind": kind,
        "size": round(size, 3),
        "colors": [_rgb(hue, saturation, value), _rgb(hue, 0.4 * saturation, value)],
        "texture": {
            "kind": str(rng.choice(TEXTURES)),
            "angle": _uniform(rng, 0, 360),
            "cycles": _uniform(rng, 1.2, 1.8),  # of stripes, across the shape
        },
        "tilt": _uniform(rng, -25, 25),
    }


def _rgb(hue: float, saturation: float, value: float) -> list[float]:
    return [round(c, 4) for c in colorsys.hsv_to_rgb(hue, saturation, value)]


# --- motions ---------------------------------------------------------------------------------------------------------
# Each function takes (rng, sizes, num_frames), lengths in frame widths, and returns the parameters of the motion and,
# for each visible shape, its (centers, angles, scales) over the frames. Periodic motions have the period of the clip.

Motion = tuple[dict, list[tuple]]


def _sample_turn(rng: np.random.Generator) -> int:
    return int(rng.choice([-1, 1]))


def _sample_center(rng: np.random.Generator) -> list[float]:
    """A center so close to the middle that the largest shape stays in the frame, zoomed or shaken."""
    return [_uniform(rng, 0.35, 0.65), _uniform(rng, 0.35, 0.65)]


def _slide(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """Straight from one side to the opposite one, at constant speed."""
    heading, margin, height = int(rng.choice([0, 90, 180, 270])), sizes[0] / 2, _sample_center(rng)[1]
    x = np.linspace(margin, 1 - margin, num_frames)
    path = np.stack([x, np.full_like(x, height)], -1)
    return {"heading": heading, "height": height}, [(_rotate(path - 0.5, heading) + 0.5, 0, 1)]


def _bounce(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """Two jumps off the floor."""
    x = _sample_center(rng)[0]
    floor, ceiling = 0.98 - sizes[0] / 2, 0.02 + sizes[0] / 2
    y = floor + (ceiling - floor) * np.abs(np.sin(2 * np.pi * np.arange(num_frames) / num_frames))
    return {"x": x, "jumps": 2}, [(np.stack([np.full_like(y, x), y], -1), 0, 1)]


def _orbit(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """Once around the middle of the frame, upright, from the top."""
    turn, radius = _sample_turn(rng), round(0.48 - sizes[0] / 2, 4)
    path = _circle(radius, turn * _one_turn(num_frames) - 90) + 0.5
    return {"turn": turn, "radius": radius}, [(path, 0, 1)]


def _spin(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """One turn in place."""
    turn, center = _sample_turn(rng), _sample_center(rng)
    return {"turn": turn}, [(center, turn * _one_turn(num_frames), 1)]


def _zoom(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """Grows, then shrinks, once."""
    scales = 1 + 0.4 * np.sin(np.radians(_one_turn(num_frames)))
    return {"amplitude": 0.4}, [(_sample_center(rng), 0, scales)]


def _shake(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """A quick, short oscillation, horizontal or vertical, with a period of four frames."""
    heading, center, amplitude = int(rng.choice([0, 90])), np.array(_sample_center(rng)), 0.1
    swing = amplitude * np.sin(np.pi / 2 * np.arange(num_frames))
    path = center + _rotate(np.stack([swing, np.zeros_like(swing)], -1), heading)
    return {"heading": heading, "amplitude": amplitude, "period_frames": 4}, [(path, 0, 1)]


def _swap(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    """Two shapes, side by side, swap places, each along half a circle, slow at the ends."""
    turn, radius = _sample_turn(rng), round(0.48 - max(sizes[:2]) / 2, 4)
    t = np.linspace(0, 1, num_frames)
    angle = turn * 180 * (1 - np.cos(np.pi * t)) / 2
    tracks = [(_circle(radius, angle + offset) + 0.5, 0, 1) for offset in (0, 180)]
    return {"turn": turn, "radius": radius}, tracks


def _still(rng: np.random.Generator, sizes: list[float], num_frames: int) -> Motion:
    return {}, [(_sample_center(rng), 0, 1)]


def _repeat(motion: str, tracks: list[tuple], period: int, num_frames: int) -> list[tuple]:
    """Tracks of one period -> of all frames: `slide` returns the way it came, in `swap` the shapes change back.

    Both rest at the ends of a period, which has one frame less so that no frame is repeated.
    """
    shapes = ((period, 2), period, period)
    tracks = [tuple(map(np.broadcast_to, track, shapes)) for track in tracks]
    following = {"slide": [tuple(values[::-1] for values in track) for track in tracks], "swap": tracks[::-1]}
    steps = max(period - (motion in following), 1)
    frame = np.arange(num_frames) % (2 * steps)
    return [
        tuple(np.concatenate([a[:steps], b[:steps]])[frame] for a, b in zip(track, after, strict=True))
        for track, after in zip(tracks, following.get(motion, tracks), strict=True)
    ]


def _one_turn(num_frames: int) -> np.ndarray:
    return 360 * np.arange(num_frames) / num_frames


def _circle(radius: float, degrees: np.ndarray) -> np.ndarray:
    return radius * np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], -1)


def _rotate(points: np.ndarray, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


_MOTIONS = dict(zip(MOTIONS, (_slide, _bounce, _orbit, _spin, _zoom, _shake, _swap, _still), strict=True))


# --- rendering -------------------------------------------------------------------------------------------------------


def render_sprite(factors: dict) -> np.ndarray:
    """Draw a clip from its factors: uint8 (T, H, W, 3), RGB. A pure function; edges are antialiased."""
    resolution = factors["resolution"]
    y, x = np.mgrid[:resolution, :resolution].astype(np.float32) + 0.5
    background = _draw_background(factors["background"], x / resolution, y / resolution)
    clip = np.repeat(background[None], factors["num_frames"], axis=0)
    for shape in factors["shapes"]:
        _draw_shape(clip, shape, x, y)
    return np.round(clip.clip(0, 1) * 255).astype(np.uint8)


def _draw_background(background: dict, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A gradient of two colors with a faint wave of brightness, (H, W, 3) in [0, 1]."""

    def along(degrees: float) -> np.ndarray:
        angle = np.radians(degrees)
        return (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)

    first, second = np.array(background["colors"], dtype=np.float32)
    blend = np.clip(0.5 + along(background["angle"]), 0, 1)[..., None]
    wave = background["wave"]
    light = wave["amplitude"] * np.sin(2 * np.pi * wave["cycles"] * along(wave["angle"]) + np.radians(wave["phase"]))
    return (first * (1 - blend) + second * blend + light[..., None]).astype(np.float32)


def _draw_shape(clip: np.ndarray, shape: dict, x: np.ndarray, y: np.ndarray) -> None:
    """Draw one shape over every frame of `clip`, in place."""
    centers = np.array(shape["centers"], dtype=np.float32)[:, :, None, None]
    scales = np.array(shape["scales"], dtype=np.float32)[:, None, None]
    angles = np.radians(np.array(shape["angles"], dtype=np.float32))[:, None, None]
    dx, dy = (x - centers[:, 0]) / scales, (y - centers[:, 1]) / scales
    u = dx * np.cos(angles) + dy * np.sin(angles)  # along the axes of the shape
    v = dy * np.cos(angles) - dx * np.sin(angles)
    radius = shape["size"] / 2

    # The distance to the edge in screen pixels determines how much of a pixel is covered.
    coverage = np.clip(0.5 - _signed_distance(shape["kind"], u, v, radius) * scales, 0, 1)[..., None]
    texture = shape["texture"]
    angle = np.radians(texture["angle"])
    w = u * np.cos(angle) + v * np.sin(angle)
    if texture["kind"] == "split":
        second = np.clip(0.5 + w * scales, 0, 1)
    else:
        second = np.clip(0.5 + 2 * np.sin(np.pi * texture["cycles"] * w / radius), 0, 1)
    first_color, second_color = np.array(shape["colors"], dtype=np.float32)
    fill = first_color + second[..., None] * (second_color - first_color)
    clip += coverage * (fill - clip)


def _signed_distance(kind: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the shape's edge, negative inside; exact near straight edges, as antialiasing requires."""
    rho = np.hypot(u, v)
    if kind == "disc":
        return rho - radius
    if kind == "ring":
        return np.abs(rho - 0.72 * radius) - 0.28 * radius
    if kind == "cross":
        u, v = np.abs(u), np.abs(v)
        return np.maximum(np.maximum(u, v) - radius, np.minimum(u, v) - 0.4 * radius)
    corners = {"triangle": 3, "square": 4, "star": 5}[kind]
    sector = 2 * np.pi / corners
    # Fold the plane into one sector, from a corner (angle 0) to halfway to the next; squares rest on a side.
    start = np.pi / 4 if kind == "square" else -np.pi / 2
    fold = np.abs((np.arctan2(v, u) - start + sector / 2) % sector - sector / 2)
    a, b = rho * np.cos(fold), rho * np.sin(fold)
    outer = radius * (1.2 if kind == "triangle" else 1.1)  # so that all kinds look similarly large
    inner = outer * (0.5 if kind == "star" else np.cos(sector / 2))
    normal = np.array([inner * np.sin(sector / 2), outer - inner * np.cos(sector / 2)])
    normal /= np.linalg.norm(normal)
    return (a - outer) * normal[0] + b * normal[1]


def subclass(factors: dict) -> str:
    """The motion and what moves, such as `orbit/star`; both shapes in order for two, `swap/ring-disc`."""
    return f"{factors['motion']}/{'-'.join(shape['kind'] for shape in factors['shapes'])}"


# --- files -----------------------------------------------------------------------------------------------------------


def write_sprites(
    root: str | os.PathLike,
    clips_per_class: int,
    *,
    seed: int,
    resolution: int = 64,
    num_frames: int = 16,
    fps: float = 8,
    period: int | None = None,
    show_progress: bool = False,
) -> list[Path]:
    """Write `root/<motion>/<motion>_<index:04d>.mp4` (H.264) and, beside each, its factors as .json.

    The folder is a data set with the motions as classes; `root/shapes.csv` lists it with the classes of `subclass`.
    Clip i of a class depends on (seed, class, i) only, so a larger set begins with the smaller one. `resolution` is
    even, in pixels, `fps` in frames per second; `period`, in frames, is that of `sample_factors`. Returns the clips'
    paths, class by class.
    """

    def write(task: tuple[int, int]) -> tuple[Path, str]:
        label, index = task
        motion = MOTIONS[label]
        rng = np.random.default_rng([seed, label, index])
        sizes = dict(resolution=resolution, num_frames=num_frames, fps=fps, period=period)
        factors = sample_factors(rng, motion, **sizes)
        path = Path(root) / motion / f"{motion}_{index:04d}.mp4"
        with atomic_write(path.with_suffix(".json")) as unfinished:
            unfinished.write_text(json.dumps(factors) + "\n")
        return write_video(path, render_sprite(factors), fps), subclass(factors)

    tasks = [(label, index) for label in range(len(MOTIONS)) for index in range(clips_per_class)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # NumPy and x264 release the GIL
        done = pool.map(write, tasks)
        written = list(progress(done, "sprites", total=len(tasks)) if show_progress else done)
    with atomic_write(Path(root) / "shapes.csv") as unfinished, unfinished.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "label"])
        table.writerows([path.relative_to(root).as_posix(), label] for path, label in written)
    return [path for path, _ in written]
