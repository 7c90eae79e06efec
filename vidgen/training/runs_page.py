"""One self-contained HTML page that compares training runs: best validations, differences of configs, and curves."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..common.html_pages import swatch, table, write_page
from ..common.svg_charts import Line, line_chart
from .best_model import PREFIX, higher_is_better
from .run_folder import BASELINE, RunFolder, ranks_models

TEMPLATE = Path(__file__).with_name("runs_page.html")
OWN_KEYS = {"output_dir", "resume"}  # differ between any two runs
SPEED = ("clips_per_second", "data_wait", "tflops", "mfu", "peak_memory_gib", "hours_left")


def write_runs_page(path: str | os.PathLike, runs: Sequence[RunFolder]) -> Path:
    """Write the page, completely or not at all; it loads nothing from elsewhere.

    Args:
        path: the page.
        runs: at least one.
    """
    swatches = (f"<span>{swatch(style)}{name}</span>" for style, name in enumerate(_names(runs)))
    texts = {
        "legend": "".join(swatches),
        "runs": _runs_table(runs),
        "best": _best_table(runs),
        "differences": _differences_table(runs),
        "charts": _charts(runs),
    }
    return write_page(path, f"Comparison of {len(runs)} training runs", TEMPLATE, texts)


def config_differences(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """The values, one of each run, of the config keys that differ; `...` where a run does not have the key.

    Keys that only the other kind of model has are left out.
    """
    is_mixed = len({run.kind for run in runs}) > 1
    differences = {}
    for key in dict.fromkeys(key for run in runs for key in run.config):
        values = [run.config.get(key, ...) for run in runs]
        if key in OWN_KEYS or (is_mixed and ... in values):
            continue
        if any(value != values[0] for value in values):
            differences[key] = values
    return differences


def _runs_table(runs: Sequence[RunFolder]) -> str:
    rows = []
    for style, run in enumerate(runs):
        steps = run.config.get("train.max_train_steps")
        kept = f"{run.best['metric']} {run.best['value']:.5g} at step {run.best['step']}" if run.best else ""
        rows.append(
            [
                f"{swatch(style)}{html.escape(run.name)}",
                run.kind,
                f"{run.last_step}{'' if steps is None else f' of {steps}'}",
                html.escape(kept),
                html.escape(", ".join(run.checkpoints)),
                "yes" if run.has_final else "no",
            ]
        )
    return table(["run", "model", "step", "kept in best/", "checkpoints", "final/ written"], rows)


def _best_table(runs: Sequence[RunFolder]) -> str:
    """The best value of every validation metric in each run that has one; the best of all runs is bold."""
    metrics = [metric for metric in _all_metrics(runs) if ranks_models(metric)]
    runs = [run for run in runs if any(metric in run.curves for metric in metrics)]
    if not metrics:
        return "<p>No run has validation metrics.</p>"
    rows = []
    for metric in metrics:
        points = [run.best_validation(metric) for run in runs]
        values = [point[1] for point in points if point is not None]
        best = (max if higher_is_better(metric) else min)(values)
        cells = ["" if point is None else f"{point[1]:.5g} <small>at step {point[0]}</small>" for point in points]
        cells = [
            f"<b>{cell}</b>" if len(values) > 1 and point is not None and point[1] == best else cell
            for cell, point in zip(cells, points, strict=True)
        ]
        arrow = "↑" if higher_is_better(metric) else "↓"
        rows.append([f"{html.escape(metric.removeprefix(PREFIX))} {arrow}", *cells])
    return table(["metric", *_names(runs)], rows)


def _differences_table(runs: Sequence[RunFolder]) -> str:
    differences = config_differences(runs)
    if not differences:
        return f"<p>{'There is one run.' if len(runs) == 1 else 'The configs are equal.'}</p>"
    rows = [
        [f"<code>{html.escape(key)}</code>", _format(values[0]), *(_format(x, x == values[0]) for x in values[1:])]
        for key, values in differences.items()
    ]
    return table(["key", *_names(runs)], rows)


def _charts(runs: Sequence[RunFolder]) -> str:
    """Charts of all metrics in groups; the groups that are rarely needed are closed."""
    metrics = _all_metrics(runs)
    validation = [metric for metric in metrics if ranks_models(metric)]
    baselines = [metric for metric in metrics if BASELINE.fullmatch(metric)]
    settings = [m for m in metrics if m.startswith(("learning_rate", "grad_norm")) or m == "epoch"]
    speed = [metric for metric in metrics if metric in SPEED]
    training = [m for m in metrics if m not in {*validation, *baselines, *settings, *speed}]
    groups = [
        ("Validation", validation, True),
        ("Training", training, True),
        ("Learning rates and gradient norms", settings, False),
        ("Speed", speed, False),
        ("Baselines", baselines, False),
    ]
    return "".join(
        f'<details{" open" if is_open else ""}><summary>{title}</summary><div class="charts">'
        f"{''.join(_chart(metric, runs) for metric in members)}</div></details>"
        for title, members, is_open in groups
        if members
    )


def _chart(metric: str, runs: Sequence[RunFolder]) -> str:
    lines = []
    for style, run in enumerate(runs):
        best = run.best_validation(metric) if ranks_models(metric) else None
        if metric in run.curves:
            lines.append(Line(run.name, run.curves[metric], style, marked=best and best[0]))
    return line_chart(metric, lines)


def _all_metrics(runs: Sequence[RunFolder]) -> list[str]:
    return list(dict.fromkeys(metric for run in runs for metric in run.curves))


def _names(runs: Iterable[RunFolder]) -> list[str]:
    return [html.escape(run.name) for run in runs]


def _format(value: Any, is_same: bool = False) -> str:
    """A config value as HTML; gray if it is the same as that of the first run, or missing."""
    text = "not set" if value is ... else f"{value:g}" if isinstance(value, float) else str(value)
    return f'<span class="same">{html.escape(text)}</span>' if is_same or value is ... else html.escape(text)
