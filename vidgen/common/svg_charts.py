"""Line charts as SVG text, for pages that need no other file and no script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 26, 26  # margins in pixels
# Okabe and Ito (2008): distinguishable with any color vision. More lines than colors are dashed.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8a00")
MAX_POINTS = 400  # of a line; longer curves are averaged
FEW_POINTS = 12  # at most this many points are also drawn as dots


@dataclass(frozen=True)
class Line:
    """A curve of a chart.

    Attributes:
        name: shown when the pointer is on the line.
        points: {x: y}, x ascending, both finite.
        style: number of its color, and beyond the colors of its dashes.
        marked: the x of a point to mark.
    """

    name: str
    points: Mapping[float, float]
    style: int
    marked: float | None = None


def line_color(style: int) -> str:
    """The color of a line of this style."""
    return COLORS[style % len(COLORS)]


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """Draw lines over a common x axis; returns an `<svg>` element.

    The y axis is logarithmic if all values are positive and span a factor of 10 or more. Long curves are drawn as
    means of consecutive points.

    Raises:
        ValueError: if there is no point.
    """
    xs = [x for line in lines for x in line.points]
    ys = [y for line in lines for y in line.points.values()]
    if not xs:
        raise ValueError(f"the chart {title!r} has no points.")
    is_log = min(ys) > 0 and max(ys) >= 10 * min(ys)
    x_axis = _Axis.around(xs, LEFT, WIDTH - RIGHT)
    y_axis = _Axis.around(ys, HEIGHT - BOTTOM, TOP, is_log)
    parts = [f'<text class="title" x="{LEFT}" y="16">{html.escape(title)}{" (log)" if is_log else ""}</text>']
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{value:.4g}</text>')
    are_whole = all(x == round(x) for x in xs)
    for value in x_axis.ticks():
        if are_whole and value != round(value):
            continue
        x = x_axis.place(value)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{value:.6g}</text>')
    parts += [_draw_line(line, x_axis, y_axis) for line in lines if line.points]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'


def _draw_line(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    color = line_color(line.style)
    dashes = ("", "6 3", "2 2")[line.style // len(COLORS) % 3]
    points = _average(list(line.points.items()))
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    name = html.escape(line.name)
    drawn = f'<polyline points="{text}" stroke="{color}" stroke-dasharray="{dashes}"><title>{name}</title></polyline>'
    if len(places) <= FEW_POINTS:
        for (x, y), (step, value) in zip(places, points, strict=True):
            label = f"{name}, {step:g}: {value:.5g}"
            drawn += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{color}"><title>{label}</title></circle>'
    if line.marked is not None:
        x, y = x_axis.place(line.marked), y_axis.place(line.points[line.marked])
        drawn += (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="none" stroke="{color}" stroke-width="1.6">'
            f"<title>{name}, best: {line.points[line.marked]:.5g} at {line.marked}</title></circle>"
        )
    return drawn


def _average(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, means of consecutive ones."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(math.fsum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


@dataclass(frozen=True)
class _Axis:
    """Places values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, is_log: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if low == high:
            margin = abs(low) / 2 or 1.0
            low, high = low - margin, high + margin
        return cls(low, high, start, end, is_log)

    def place(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.is_log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values within the axis; powers of ten, or with 2 and 5 between them, if logarithmic."""
        if self.is_log:
            exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
            values = [factor * 10.0**exponent for exponent in exponents for factor in factors]
            every = math.ceil(len(values) / 8)
            return [value for value in values[::every] if self.low <= value <= self.high]
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(unit * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (unit * factor) <= 5)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]
