"""Matplotlib figures in one style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, ScalarFormatter

DARK_BLUE, BLUE, LIGHT_BLUE, ORANGE, TEAL = "#1e3a8a", "#2563eb", "#93b4f5", "#d97706", "#0d9488"
GRAY, LIGHT_GRAY = "#6b7280", "#e5e7eb"


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure (inches) and its grid of axes (rows, columns), without top and right spines."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels


def set_log_axes(axes: Axes, ticks: Sequence[float]) -> None:
    """Logarithmic axes with plain numbers: the given ticks of x, and 1, 1.5, 2, 3, 5, 7 times powers of ten of y."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())


def errors(distances: Iterable[dict[str, Any]]) -> list[list[float]]:
    """Lengths of error bars below and above each value: (2, N)."""
    pairs = [(d["value"], d["interval"] or [d["value"]] * 2) for d in distances]
    return [[value - low for value, (low, _) in pairs], [high - value for value, (_, high) in pairs]]


def dot_chart(groups: dict[str, dict[str, Sequence[float]]], from_zero: bool = False) -> Figure:
    """One panel per group: a row per name, with a dot for each value and a bar at the mean.

    All panels have the same span, so that equal distances are equal differences; with `from_zero` every panel begins
    at 0 instead, for values of different units.
    """
    ranges = [[value for values in rows.values() for value in values] for rows in groups.values()]
    span = 1.25 * max(max(values) - min(values) for values in ranges) or 1.0
    height = 0.9 + 0.38 * max(map(len, groups.values()))
    figure, panels = new_figure(2.6 * len(groups) + 2.2, height, columns=len(groups))
    labels_before: list[str] = []
    for axes, (title, rows), values in zip(panels[0], groups.items(), ranges, strict=True):
        for row, seeds in enumerate(rows.values()):
            axes.plot(sum(seeds) / len(seeds), row, "|", color=DARK_BLUE, ms=15, mew=2)
            axes.plot(seeds, [row] * len(seeds), "o", color=BLUE, alpha=0.55, ms=6, mew=0)
        labels = list(rows)
        axes.set_yticks(range(len(rows)), [] if labels == labels_before else labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        center = (max(values) + min(values)) / 2
        axes.set_xlim((0, 1.1 * max(values)) if from_zero else (center - span / 2, center + span / 2))
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        labels_before = labels
    return figure
