"""Speed of vidgen, relative to the machine's limits and to other video autoencoders measured in the same run.

    python -m benchmarks.speed --scale cpu                     all parts
    python -m benchmarks.speed --scale cpu round_trip peers    some parts, printed and written to the work folder
    python -m benchmarks.speed --scale paper                   on a GPU

Times are medians, and compared cases are measured in turns, because machines are noisy. With OMP_NUM_THREADS=1 times
are CPU times of the thread, which other load hardly affects.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from vidgen.common.errors import UserError

from ..common.harness import Benchmark, Results
from ..common.tables import markdown_table
from . import models
from .peers import fast, peers
from .quantization import quantization
from .timing import Row, device_of, measure_limits

PARTS: dict[str, Callable[[str], list[Row]]] = {  # functions of a scale
    "round_trip": models.round_trip,
    "train_step": models.train_step,
    "dit_step": models.dit_step,
    "sampling": models.sampling,
    "quantization": quantization,
    "fast": fast,
    "peers": peers,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")


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
        results["parts"][name] = PARTS[name](options.scale)
    return results


def tables(results: Results) -> str:
    limits = ", ".join(f"{name} {value:,.0f}" for name, value in results["ceilings"].items())
    texts = [f"Limits of the machine with {results['threads']} threads: {limits}."]
    for name, part in PARTS.items():  # older records have other parts too
        if name in results["parts"]:
            texts += [f"### `{name}`", part.__doc__, rows_table(results["parts"][name])]
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


BENCHMARK = Benchmark("speed", "Speed", run, tables, add_options=add_options)

if __name__ == "__main__":
    BENCHMARK.main()
