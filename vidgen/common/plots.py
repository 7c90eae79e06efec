"""Plots: curves of training metrics, histograms of a data set, and intervals. Files are written atomically."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .io import atomic_write


def read_curves(metrics_jsonl: str | os.PathLike) -> dict[str, dict[int, float]]:
    """Read every scalar of a JSON-lines file with `step` in each line: {key: {step: value}}, steps ascending.

    A step written twice (a resumed run) keeps its last value. Values that are not finite numbers and an incomplete
    last line are left out. Raises `FileNotFoundError`, or `ValueError` for another line that is not JSON.
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
    """Write a PNG with one panel per key of a run's `metrics.jsonl`: every value faint, with a running mean.

    The axis is logarithmic where all values are positive and span a factor of 10 or more.

    Args:
        keys: the scalars, in this order; all of them by default.

    Raises:
        ValueError: if the file has none of the keys; otherwise as `read_curves`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    curves = read_curves(metrics_jsonl)
    panels = [key for key in (keys or curves) if key in curves]
    if not panels:
        raise ValueError(f"{metrics_jsonl} has no {' or '.join(keys) if keys else 'scalars'} to draw.")
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    for i, key in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = list(curves[key]), list(curves[key].values())
        window = len(values) // 50
        style = dict(alpha=0.25) if window else dict(marker=".")
        axes.plot(steps, values, color="#2563eb", lw=1, **style)
        if window:
            axes.plot(steps, _running_mean(values, window), color="#2563eb", lw=1.6)
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
        if i >= len(panels) - columns:
            axes.set_xlabel("step", fontsize=9)
    return _save_figure(path, figure)


def dataset_histograms(
    path: str | os.PathLike, durations: Sequence[float], sides: Sequence[int], rates: Sequence[float]
) -> Path:
    """Write a PNG of histograms of videos: duration (s), short side (pixels) and frame rate (frames/s).

    Raises `ValueError` if there are no videos.
    """
    from matplotlib.figure import Figure

    if not len(durations):
        raise ValueError(f"{path}: there are no videos to draw histograms of.")
    figure = Figure(figsize=(12.6, 2.9), dpi=110, layout="constrained")
    panels = {"duration (s)": durations, "short side (pixels)": sides, "frame rate (frames/s)": rates}
    for place, (label, values) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 3, place)
        axes.hist(values, bins=min(40, max(1, len(set(values)))))
        axes.set_xlabel(label)
        axes.set_ylabel("videos")
        axes.spines[["top", "right"]].set_visible(False)
    return _save_figure(path, figure)


Interval = tuple[float, float | None, float | None]  # value, low and high; None without an interval


def interval_plot(path: str | os.PathLike, panels: dict[str, dict[str, Interval]]) -> Path:
    """Write a PNG with a panel for each title: in a row for each label a value with its interval.

    Raises `ValueError` if there are no panels.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError(f"{path}: there are no values to draw.")
    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(7.0, len(panels) * (0.9 + 0.35 * rows)), dpi=110, layout="constrained")
    for place, (title, intervals) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, place)
        for row, (value, low, high) in enumerate(intervals.values()):
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color="#93c5fd", lw=5, solid_capstyle="butt")
            axes.plot(value, row, "o", color="#2563eb")
        axes.axvline(0, color="#9ca3af", lw=0.8)
        axes.set_yticks(range(len(intervals)), list(intervals))
        axes.set_ylim(len(intervals) - 0.5, -0.5)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return _save_figure(path, figure)


def _save_figure(path: str | os.PathLike, figure: Any) -> Path:
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
    return Path(path)


def _running_mean(values: list[float], window: int) -> np.ndarray:
    """The mean of each value with the `window` before and after it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - window, 0), np.minimum(i + window + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
