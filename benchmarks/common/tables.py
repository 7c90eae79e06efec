"""Markdown tables and the texts of their cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; floats get four significant digits, and None is an empty cell."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean_and_spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and half the range over a few runs: "24.31 ± 0.12"; the value alone for one run."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def score_cell(score: dict[str, Any], form: str = ".3g", chance: bool = True) -> str:
    """A value with its interval, and chance after a bar: "0.98 (0.961 to 0.996) | 0.125", escaped for a table."""
    text = f"{score['value']:{form}} ({score['low']:{form}} to {score['high']:{form}})"
    return f"{text} \\| {score['chance']:{form}}" if chance and score.get("chance") is not None else text


def interval_cell(figure: dict[str, Any], digits: int, sign: str = "") -> str:
    """A mean with its interval, if it has one: "22.31 (21.90 to 22.75)"."""
    text = f"{figure['mean']:{sign}.{digits}f}"
    if figure["low"] is None:
        return text
    return f"{text} ({figure['low']:.{digits}f} to {figure['high']:.{digits}f})"


def distance_cell(distance: dict[str, Any] | None) -> str | None:
    """A Fréchet distance with its interval, if it has one: "0.738 (0.597 to 0.856)"; None if there is no distance."""
    if not distance or distance["value"] is None:
        return None
    text = f"{distance['value']:.3g}"
    low, high = distance["interval"] or (None, None)
    return text if low is None else f"{text} ({low:.3g} to {high:.3g})"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
