"""How fast vidgen is: against what the machine can do and against other video autoencoders, in one run.

    python -m benchmarks.speed --scale cpu                     every part: half an hour on two cores
    python -m benchmarks.speed --scale cpu round_trip peers    some parts, printed and kept in the work folder
    python -m benchmarks.speed --scale paper                   on a GPU

Times are medians, and what is compared is taken in turns, for machines are noisy. With OMP_NUM_THREADS=1 times are the
thread's own, which neighbors hardly lengthen: use it where the machine has other work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from benchmarks.speed import data as speed_data
from benchmarks.speed import models as speed_models
from vidgen.common.errors import UserError

from ..common.harness import Benchmark, Results, markdown_table
from .growth import growth
from .models import SHARE
from .peers import FOLDED, OURS, peers
from .timing import Row, ceilings, device_of

PARTS: dict[str, Callable[..., list[Row]]] = {
    "round_trip": speed_models.round_trip,
    "rounding": speed_models.rounding,
    "modes": speed_models.modes,
    "train_step": speed_models.train_step,
    "dit_step": speed_models.dit_step,
    "sampling": speed_models.sampling,
    "compiled": speed_models.compiled,
    "peers": peers,
    "growth": growth,
    "data": speed_data.data,
    "video": speed_data.video,
    "fvd": speed_data.fvd,
    "attention": speed_models.attention,
    "qformer": speed_models.qformer,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--pipeline", type=Path, metavar="FOLDER", help="a trained one, for the rounding of its weights"
    )


def run(options: argparse.Namespace) -> Results:
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise UserError(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}.")
    if options.scale == "paper" and not torch.accelerator.is_available():
        raise UserError("--scale paper measures a GPU and there is none here; --scale cpu measures the CPU.")
    if options.parts:
        options.results = options.work_dir  # a part is no record
    device = device_of(options.scale)
    results: Results = {"ceilings": ceilings(device), "threads": torch.get_num_threads(), "parts": {}}
    for name in options.parts or PARTS:
        print(name, file=sys.stderr, flush=True)
        part = partial(PARTS[name], pipeline=options.pipeline) if name == "rounding" else PARTS[name]
        results["parts"][name] = part(options.scale)
    return results


def held(results: Results) -> Iterable[tuple[str, float, str]]:
    """What must hold on any machine: a ratio taken in this run, and its bound."""
    parts = results["parts"]
    for row in parts.get("round_trip", ()):
        if row["precision"] == "bf16":
            yield "bf16 round trip, share of the matmul rate", row[SHARE], "at least 0.55"
    for row in parts.get("rounding", ())[1:]:
        yield "bf16 against fp32 on trained weights, dB", row["PSNR of bf16 to fp32, dB"], "at least 40"
    for row in parts.get("modes", ()):
        what = f"inference_mode over no_grad, weights in {row['weights']}"
        yield what, row["inference_mode / no_grad"], "at most 1.05"
    for row in parts.get("train_step", ()):
        if row["size"] == "base" and row["precision"] == "bf16":
            what = "base, bf16 training step" + (", checkpointing" if row["checkpointing"] else "")
            yield f"{what}: share of the matmul rate", row[SHARE], "at least 0.45"
    steps = parts.get("dit_step", ())
    for row in steps:
        if row["precision"] == "bf16" and row["tokens of a clip"] == steps[0]["tokens of a clip"]:
            yield f"DiT step, bf16, {row['clips']} clips, share of the matmul rate", row[SHARE], "at least 0.50"
    for row in parts.get("sampling", ()):
        yield "sampling and decoding over the sum of its parts", row["pipeline / sum of its parts"], "at most 1.10"
    rows = {row["autoencoder"]: row for row in parts.get("peers", ()) if "failed" not in row}
    others = [row for name, row in rows.items() if name not in (OURS, FOLDED)]
    if others:
        for figure in ("round trip, s", "latent values"):
            best = min(others, key=lambda row: row[figure])
            yield (
                f"{figure.split(',')[0]}: {best['autoencoder']} over ours",
                best[figure] / rows[OURS][figure],
                "at least 1",
            )
        best = min(others, key=lambda row: row["DiT step, s"])
        ratio = best["DiT step, s"] / rows[FOLDED]["DiT step, s"]
        yield f"DiT step: {best['autoencoder']} over our 65 tokens", ratio, "at least 1"
    for row in parts.get("data", ()):
        if "data wait" in row:
            yield "share of a tiny training that waits for data", row["data wait"], "at most 0.05"
    for row in parts.get("video", ()):
        if "of the slowest part" in row:
            yield "a minute of video, of the slowest part's rate", row["of the slowest part"], "at least 0.80"


def holds(value: float, bound: str) -> bool:
    words, limit = bound.rsplit(" ", 1)
    return value <= float(limit) if words == "at most" else value >= float(limit)


def tables(results: Results | None) -> str:
    if results is None:
        return ""
    said = []
    if checks := list(held(results)):
        rows = [[what, f"{value:.3g}", bound, "yes" if holds(value, bound) else "no"] for what, value, bound in checks]
        said += ["### What must hold", markdown_table(["ratio", "here", "bound", "holds"], rows)]
    ceiling = ", ".join(f"{name} {value:,.0f}" for name, value in results["ceilings"].items())
    said.append(f"The machine, with {results['threads']} threads: {ceiling}.")
    for name, rows in results["parts"].items():
        text = " ".join((PARTS[name].__doc__ or "").split("\n")[0].split())
        said += [f"### `{name}`", text, table(rows)]
    return "\n\n".join(said)


def table(rows: list[Row]) -> str:
    """Every row's figures; columns as they first come."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[_said(row.get(column)) for column in columns] for row in rows])


def _said(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(f"({_said(item)})" if isinstance(item, list) else str(_said(item)) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else value


def plot(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure

    parts = results["parts"]
    figure = Figure(figsize=(15, 4.4), dpi=110, layout="constrained")
    shares, against, grown = figure.subplots(1, 3)
    bars = {
        **{f"round trip, {row['precision']}": row[SHARE] for row in parts.get("round_trip", ())},
        **{
            f"training, {row['size']}, {row['precision']}{', ckpt.' if row['checkpointing'] else ''}": row[SHARE]
            for row in parts.get("train_step", ())
        },
        **{
            f"DiT, {row['precision']}, {row['clips']} x {row['tokens of a clip']} tokens": row[SHARE]
            for row in parts.get("dit_step", ())
        },
    }
    shares.barh(list(bars), list(bars.values()), color="#93b4f5")
    shares.set_xlim(0, 1)
    shares.set_title("share of the measured matmul rate", fontsize=10)
    rows = [row for row in parts.get("peers", ()) if "failed" not in row]
    for shift, figure_name in enumerate(("round trip, s", "latent values", "DiT step, s")):
        places = [place + 0.27 * (shift - 1) for place in range(len(rows))]
        ratios = [row[figure_name] / rows[0][figure_name] for row in rows]
        color = ("#1e3a8a", "#60a5fa", "#cbd5e1")[shift]
        against.barh(places, ratios, height=0.25, color=color, label=figure_name.split(",")[0])
    against.set_yticks(range(len(rows)), [row["autoencoder"] for row in rows])
    against.axvline(1, color="#6b7280", lw=0.8)
    if rows:
        against.set_xscale("log")
        against.legend(frameon=False, fontsize=8)
    against.set_title("over VidTwin's (log)", fontsize=10)
    for row in parts.get("growth", ()):
        x, y = ([value / values[0] for value in values] for values in (row["sizes"], row["times, s"]))
        grown.plot(x, y, "o-", ms=4, label=f"{row['what grows'].split(':')[0]}, exponent {row['exponent']:.2f}")
    if "growth" in parts:
        grown.set_xscale("log", base=2)
        grown.set_yscale("log", base=2)
        grown.legend(frameon=False, fontsize=8)
    grown.set_title("time over size, both over the smallest's", fontsize=10)
    for axes in (shares, against):
        axes.invert_yaxis()
    for axes in (shares, against, grown):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path)


BENCHMARK = Benchmark(
    name="speed",
    title="Speed",
    needs="a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
