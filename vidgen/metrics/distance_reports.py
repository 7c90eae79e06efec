"""Reports of `vidgen.metrics.compare`: texts of a table, JSON, and a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.io import atomic_write
from ..common.plots import interval_plot
from .compare import Estimate, VideoDistance

TITLES = {"frechet": "Fréchet distance", "mmd": "MMD²"}


def write_distances(path: str | os.PathLike, results: Sequence[VideoDistance]) -> Path:
    """Write JSON: one result as an object, several as a list of such objects."""
    records = [asdict(result) | {"command": result.versions["command"]} for result in results]
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(records[0] if len(records) == 1 else records, indent=1) + "\n")
    return Path(path)


def write_plot(path: str | os.PathLike, results: Sequence[VideoDistance]) -> Path:
    """Write a PNG with a panel for each result: fake vs. real and real vs. real, with 95 % intervals."""
    panels = {}
    for result in results:
        rows = {"fake vs. real": result, "real vs. real": result.real_vs_real}
        panels[f"{TITLES[result.distance]}, {result.detector}, protocol {result.protocol}"] = {
            f"{label} ({row.num_fake} / {row.num_real})": (row.value, row.low, row.high)
            for label, row in rows.items()
            if row is not None
        }
    return interval_plot(path, panels)


def format_estimate(estimate: Estimate | VideoDistance) -> str:
    """A value with its interval: "168.2 (160.1 to 175)"."""
    if estimate.low is None:
        return _format(estimate.value)
    return f"{_format(estimate.value)} ({_format(estimate.low)} to {_format(estimate.high)})"


def describe_detector(details: dict[str, Any]) -> str:
    """A line of `Detector.describe`: sizes, preprocessing, and hash of the weights."""
    weights = f"sha256 {details['sha256']}" if details["sha256"] else "no weights"
    return (
        f"{details['name']}: {details['dim']} values per {details['row']}, {details['parameters']:,} parameters, "
        f"{weights}; preprocessing: {details['preprocessing']}"
    )


def _format(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
