"""Captions of sprites, from their factors, in many wordings: "a pink star circles over dark green".

A caption names shape, color, motion and background, or only what moves, or only how it moves. Colors have names by
their hue; a hue close to the border of two names is left out of captions, so that names are never in doubt.

A fixed list of compositions is held out of training, to measure how a model combines words that it never saw
together: pairs of shape and motion, such as a zooming star, and of color and shape, such as a blue ring.
"""

from __future__ import annotations

import colorsys
import csv
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from ..common.io import atomic_write
from .captions import SEPARATOR
from .sprites import subclass

# --- vocabulary ------------------------------------------------------------------------------------------------------

# Hues in degrees. A color has the name of the nearest hue.
COLORS = {
    "red": 0,
    "orange": 32,
    "yellow": 60,
    "green": 120,
    "cyan": 180,
    "blue": 230,
    "purple": 275,
    "pink": 320,
}
BACKGROUNDS = {"maroon": 0, "olive": 60, "dark green": 120, "teal": 180, "navy": 240, "dark purple": 300}
BORDER = 6  # degrees on both sides of the border between two names, in which captions name no color

HELD_OUT_MOTIONS = (
    ("disc", "slide"),
    ("square", "orbit"),
    ("triangle", "shake"),
    ("star", "zoom"),
    ("ring", "bounce"),
    ("cross", "spin"),
)
HELD_OUT_COLORS = (
    ("yellow", "disc"),
    ("red", "square"),
    ("green", "triangle"),
    ("orange", "star"),
    ("blue", "ring"),
    ("purple", "cross"),
)

# Words for each factor, with the same meaning. Motions: verb and participle.
SHAPE_WORDS = {
    "disc": ("disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
}
COLOR_WORDS = {"cyan": ("cyan", "turquoise"), "purple": ("purple", "violet"), "pink": ("pink", "magenta")}
BACKGROUND_WORDS = {
    "maroon": ("maroon", "dark red"),
    "olive": ("olive", "dark yellow"),
    "dark green": ("dark green", "forest green"),
    "teal": ("teal", "dark cyan"),
    "navy": ("navy", "dark blue"),
    "dark purple": ("dark purple", "dark violet"),
}
MOTION_WORDS = {
    "slide": (
        ("slides across", "sliding across"),
        ("glides from side to side", "gliding from side to side"),
        ("moves straight across", "moving straight across"),
    ),
    "bounce": (
        ("bounces", "bouncing"),
        ("jumps up and down", "jumping up and down"),
        ("hops off the floor", "hopping off the floor"),
    ),
    "orbit": (
        ("orbits", "orbiting"),
        ("circles", "circling"),
        ("moves in a circle", "moving in a circle"),
        ("goes around the center", "going around the center"),
    ),
    "spin": (
        ("spins", "spinning"),
        ("rotates in place", "rotating in place"),
        ("turns on the spot", "turning on the spot"),
    ),
    "zoom": (
        ("zooms", "zooming"),
        ("grows and shrinks", "growing and shrinking"),
        ("gets larger, then smaller", "getting larger, then smaller"),
    ),
    "shake": (("shakes", "shaking"), ("trembles", "trembling"), ("vibrates quickly", "vibrating quickly")),
    "swap": (
        ("swap places", "swapping places"),
        ("trade places", "trading places"),
        ("switch positions", "switching positions"),
    ),
    "still": (("stays still", "staying still"), ("rests", "resting"), ("remains motionless", "remaining motionless")),
}
BACKGROUND_PHRASES = ("over {}", "on {}", "against {}", "on a {} background")
SEEN, HELD_OUT = "captions_seen.csv", "captions_held_out.csv"


# --- descriptions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpriteDescription:
    """The names of a sprite's factors; captions leave out those that are None.

    Attributes:
        motion: one of `MOTIONS`.
        shapes: the kind of each shape; in `swap` the first one starts on the right. None leaves out `colors` too.
        colors: the name of each shape's color, of `COLORS`.
        background: of `BACKGROUNDS`.
    """

    motion: str | None
    shapes: tuple[str, ...] | None
    colors: tuple[str | None, ...] = (None, None)
    background: str | None = None

    @property
    def is_held_out(self) -> bool:
        """Whether one of its shapes has a motion or a color that is held out for that shape."""
        pairs = zip(self.shapes or (), self.colors, strict=False)
        return any(
            (shape, self.motion) in HELD_OUT_MOTIONS or (color, shape) in HELD_OUT_COLORS for shape, color in pairs
        )

    @property
    def is_complete(self) -> bool:
        """Whether every factor has a name."""
        return None not in (self.motion, self.shapes, self.background, *self.colors)

    def appearance(self) -> SpriteDescription:
        """The description without the motion."""
        return replace(self, motion=None)

    def movement(self) -> SpriteDescription:
        """The description of the motion alone."""
        return SpriteDescription(self.motion, None)


def describe_sprite(factors: dict, border: float = 0.0) -> SpriteDescription:
    """Name the factors of a clip from `sample_factors`; hues within `border` degrees of two names have none."""
    shapes = factors["shapes"]
    return SpriteDescription(
        motion=factors["motion"],
        shapes=tuple(shape["kind"] for shape in shapes),
        colors=tuple(name_color(shape["colors"][0], COLORS, border) for shape in shapes),
        background=name_color(factors["background"]["colors"][1], BACKGROUNDS, border),
    )


def name_color(rgb: Sequence[float], hues: dict[str, float], border: float = 0.0) -> str | None:
    """The name whose hue is nearest to that of a color, or None within `border` degrees of the border of two names.

    Args:
        rgb: three values of at least 0 in any unit.
        hues: names with their hues in degrees, as `COLORS`.
    """
    hue = 360 * colorsys.rgb_to_hsv(*rgb)[0]
    distances = sorted((abs((hue - center + 180) % 360 - 180), name) for name, center in hues.items())
    (nearest, name), (second, _) = distances[:2]
    return name if second - nearest >= 2 * border else None


# --- captions --------------------------------------------------------------------------------------------------------


def caption_sprite(factors: dict, count: int = 3) -> list[str]:
    """Captions of a clip: `count` of all factors, `count` of the appearance, and `count` of the motion.

    A pure function of the factors, which depend on the clip's seed only.
    """
    description = describe_sprite(factors, BORDER)
    rng = np.random.default_rng(zlib.crc32(json.dumps(factors).encode()))
    parts = (description, description.appearance(), description.movement())
    return [write_caption(part, rng) for part in parts for _ in range(count)]


def write_caption(description: SpriteDescription, rng: np.random.Generator) -> str:
    """One caption of a description, in a wording drawn by `rng`."""
    subject = _write_subject(description, rng)
    background = ""
    if description.background:
        background = _choose(BACKGROUND_PHRASES, rng).format(_choose(BACKGROUND_WORDS[description.background], rng))
    if description.motion is None:
        return f"{subject} {background}".strip()
    verb, participle = _choose(MOTION_WORDS[description.motion], rng)
    wordings = [f"{subject} {verb}", f"{subject} that {verb}", f"{subject}, {participle}"]
    wordings = [f"{wording}, {background}" if "," in wording else f"{wording} {background}" for wording in wordings]
    if background:
        wordings.append(f"{background}, {subject} {verb}")
    return _choose(wordings, rng).strip(" ,")


def _write_subject(description: SpriteDescription, rng: np.random.Generator) -> str:
    """What moves: "an orange star", "two shapes", or two shapes with their sides."""
    if description.shapes is None:
        return "two shapes" if description.motion == "swap" else _choose(("something", "a shape"), rng)
    shapes = []
    for shape, color in zip(description.shapes, description.colors, strict=False):
        words = [_choose(COLOR_WORDS.get(color, (color,)), rng)] if color else []
        words.append(_choose(SHAPE_WORDS[shape], rng))
        shapes.append(f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}")
    if len(shapes) == 1:
        return shapes[0]
    right, left = f"{shapes[0]} on the right", f"{shapes[1]} on the left"
    return " and ".join((right, left) if rng.integers(2) else (left, right))


def _choose(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


# --- files -----------------------------------------------------------------------------------------------------------


def write_captions(root: str | os.PathLike, paths: Sequence[Path]) -> tuple[int, int]:
    """Write `root/captions_seen.csv` and `root/captions_held_out.csv`, of clips from `write_sprites`.

    Both have the columns path, label, caption, with the classes of `subclass` and the captions separated by `|`. The
    second one lists the clips of held-out compositions.

    Returns:
        The number of clips in each.

    Raises:
        UserError: if the factors beside a clip cannot be read.
    """
    rows: dict[str, list[list[str]]] = {SEEN: [], HELD_OUT: []}
    for path in paths:
        try:
            factors = json.loads(path.with_suffix(".json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"the factors of {path} cannot be read from the .json beside it ({error}).") from error
        table = HELD_OUT if describe_sprite(factors).is_held_out else SEEN
        caption = SEPARATOR.join(caption_sprite(factors))
        rows[table].append([path.relative_to(root).as_posix(), subclass(factors), caption])
    for table, clips in rows.items():
        with atomic_write(Path(root) / table) as unfinished, unfinished.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["path", "label", "caption"], *clips])
    return len(rows[SEEN]), len(rows[HELD_OUT])
