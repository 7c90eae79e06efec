"""Speed of vidgen, relative to the machine's limits and to other video autoencoders measured in the same run.

    python -m benchmarks.speed --scale cpu                     all parts: half an hour on two cores
    python -m benchmarks.speed --scale cpu round_trip peers    some parts, printed and written to the work folder
    python -m benchmarks.speed --scale paper                   on a GPU

Times are medians, and compared cases are measured in turns, because machines are noisy. With OMP_NUM_THREADS=1 times
are CPU times of the thread, which other load hardly affects.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure

from vidgen.common.errors import UserError

from ..common.figures import DARK_BLUE, GRAY, LIGHT_BLUE, new_figure
from ..common.harness import Benchmark, Results
from ..common.tables import markdown_table
from . import data, models
from .models import FRACTION
from .peers import COMPARED_FIGURES, FOLDED, OURS, peers
from .timing import Row, device_of, measure_limits

PARTS: dict[str, Callable[..., list[Row]]] = {
    "round_trip": models.round_trip,
    "rounding": models.rounding,
    "train_step": models.train_step,
    "dit_step": models.dit_step,
    "sampling": models.sampling,
    "compiled": models.compiled,
    "peers": peers,
    "data": data.data,
    "video": data.video,
    "attention": models.attention,
    "qformer": models.qformer,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--pipeline", type=Path, metavar="FOLDER", help="trained pipeline, for the part rounding")


def run(options: argparse.Namespace) -> Results:
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}.")
    if options.scale == "paper" and not torch.accelerator.is_available():
        raise UserError("--scale paper requires a GPU, which is not available; --scale cpu measures the CPU.")
    if options.parts:
        options.results = options.work_dir / options.scale  # some parts are no record
    device = device_of(options.scale)
    results: Results = {"ceilings": measure_limits(device), "threads": torch.get_num_threads(), "parts": {}}
    for name in options.parts or PARTS:
        print(name, file=sys.stderr, flush=True)
        arguments = {"pipeline": options.pipeline} if name == "rounding" else {}
        results["parts"][name] = PARTS[name](options.scale, **arguments)
    return results


def expectations(results: Results) -> Iterable[tuple[str, float, str]]:
    """Ratios of this run that are expected on any machine, and their bounds."""
    parts = results["parts"]
    for row in parts.get("round_trip", ()):
        if row["precision"] == "bf16":
            yield "bf16 round trip, fraction of matmul rate", row[FRACTION], "at least 0.55"
    for row in parts.get("rounding", ())[1:]:
        yield "bf16 vs. fp32 with trained weights, dB", row["PSNR of bf16 to fp32, dB"], "at least 40"
    for row in parts.get("train_step", ()):
        if row["size"] == "base" and row["precision"] == "bf16":
            case = "base, bf16 training step" + (", checkpointing" if row["checkpointing"] else "")
            yield f"{case}: fraction of matmul rate", row[FRACTION], "at least 0.45"
    steps = parts.get("dit_step", ())
    for row in steps:
        if row["precision"] == "bf16" and row["tokens of a clip"] == steps[0]["tokens of a clip"]:
            yield f"DiT step, bf16, {row['clips']} clips, fraction of matmul rate", row[FRACTION], "at least 0.50"
    for row in parts.get("sampling", ()):
        yield "sampling and decoding, relative to the sum of parts", row["pipeline / sum of parts"], "at most 1.10"
    rows = {row["autoencoder"]: row for row in parts.get("peers", ()) if "failed" not in row}
    if others := [row for name, row in rows.items() if name not in (OURS, FOLDED)]:
        for figure, ours in zip(COMPARED_FIGURES, (OURS, OURS, FOLDED), strict=True):
            best = min(others, key=lambda row: row[figure])
            label = f"{figure.split(',')[0]}: {best['autoencoder']} / {ours}"
            yield label, best[figure] / rows[ours][figure], "at least 1"
    for row in parts.get("data", ()):
        if "fraction of time waiting for data" in row:
            waiting = row["fraction of time waiting for data"]
            yield "tiny training: fraction of time waiting for data", waiting, "at most 0.05"
    for row in parts.get("video", ()):
        if "fraction of slowest stage" in row:
            rate = row["fraction of slowest stage"]
            yield "one minute of video: fraction of the slowest stage's rate", rate, "at least 0.80"


def is_within(value: float, bound: str) -> bool:
    words, limit = bound.rsplit(" ", 1)
    return value <= float(limit) if words == "at most" else value >= float(limit)


def tables(results: Results) -> str:
    texts = []
    if checks := list(expectations(results)):
        rows = [
            [label, f"{value:.3g}", bound, "yes" if is_within(value, bound) else "no"]
            for label, value, bound in checks
        ]
        texts += ["### Expectations", markdown_table(["ratio", "measured", "expected", "met"], rows)]
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in results["ceilings"].items())
    texts.append(f"Limits of the machine with {results['threads']} threads: {limits}.")
    for name, rows in results["parts"].items():
        summary = (
            PARTS[name].__doc__.split("\n")[0] if name in PARTS else "Measured by an earlier version of this program."
        )
        texts += [f"### `{name}`", summary, rows_table(rows)]
    return "\n\n".join(texts)


def rows_table(rows: list[Row]) -> str:
    """A table of all figures of the rows, with columns in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[_format(row.get(column)) for column in columns] for row in rows])


def _format(value: object) -> object:
    if isinstance(value, list | tuple):
        return ", ".join(f"({_format(v)})" if isinstance(v, list | tuple) else str(_format(v)) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else value


def plot(results: Results) -> Figure:
    parts = results["parts"]
    figure, [[fractions, comparison]] = new_figure(11.5, 4.4, columns=2)

    bars = {f"round trip, {row['precision']}": row[FRACTION] for row in parts.get("round_trip", ())}
    for row in parts.get("train_step", ()):
        label = f"training, {row['size']}, {row['precision']}{', ckpt.' if row['checkpointing'] else ''}"
        bars[label] = row[FRACTION]
    for row in parts.get("dit_step", ()):
        bars[f"DiT, {row['precision']}, {row['clips']} x {row['tokens of a clip']} tokens"] = row[FRACTION]
    fractions.barh(list(bars), list(bars.values()), color=LIGHT_BLUE)
    fractions.set_xlim(0, 1)
    fractions.set_title("fraction of the measured matmul rate", fontsize=10)

    rows = [row for row in parts.get("peers", ()) if "failed" not in row]
    for shift, (name, color) in enumerate(zip(COMPARED_FIGURES, (DARK_BLUE, "#60a5fa", "#cbd5e1"), strict=True)):
        places = [place + 0.27 * (shift - 1) for place in range(len(rows))]
        ratios = [row[name] / rows[0][name] for row in rows]
        comparison.barh(places, ratios, height=0.25, color=color, label=name.split(",")[0])
    comparison.set_yticks(range(len(rows)), [row["autoencoder"] for row in rows])
    comparison.axvline(1, color=GRAY, lw=0.8)
    if rows:
        comparison.set_xscale("log")
        comparison.legend(frameon=False, fontsize=8)
    comparison.set_title("ratio to VidTwin (log)", fontsize=10)
    for axes in (fractions, comparison):
        axes.invert_yaxis()
        axes.grid(alpha=0.25)
    return figure


BENCHMARK = Benchmark("speed", "Speed", run, tables, plot, add_options)

if __name__ == "__main__":
    BENCHMARK.main()
