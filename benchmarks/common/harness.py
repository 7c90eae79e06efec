"""What every program here shares: its options, its record, and how a record becomes a table and a picture.

A program makes one table or figure of the paper at a `--scale`: `smoke` (seconds, for CI), `cpu` (what two cores can
train) or `paper`. It leaves `NAME.json` (the figures, and everything needed to get them again), `NAME.md` and
`NAME.png`: those of `cpu` and `paper` in docs/results/SCALE, where `make results` finds them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console
from rich.markdown import Markdown

from vidgen.common.environment import environment, set_cpu_threads
from vidgen.common.errors import run_program
from vidgen.common.io import atomic_write
from vidgen.common.options import check_options
from vidgen.common.precision import DTYPES

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
SCALES = ("smoke", "cpu", "paper")
Results = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A table or figure of the paper.

    Args:
        name: of the program and of its files.
        title: a heading.
        needs: what its paper scale takes, where that was not run: "UCF-101 and 8 GPUs".
        run: from the options to the figures, as JSON holds them, or None if it left some out. Work goes to
            `options.work_dir`, and pictures beside its own to `options.results` as NAME-*.png. Their `seconds` say
            what they took where earlier starts did part of it, their `training_seconds` what the models took that
            another program may have trained. On several processes it is called on all of them, and the main one's
            figures count.
        tables: from figures, or from None where there are none, to Markdown: ours beside the paper's.
        plot: from figures to a PNG.
        add_options: adds its own to the common ones.
    """

    name: str
    title: str
    needs: str
    run: Callable[[argparse.Namespace], Results | None]
    tables: Callable[[Results | None], str]
    plot: Callable[[Results, Path], None] | None = None
    add_options: Callable[[argparse.ArgumentParser], None] | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run the program on command-line arguments; a user's mistake is one sentence and exit code 2."""
        run_program(lambda: self._main(arguments))

    def _main(self, arguments: Sequence[str] | None) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{self.name}", description=self.title)
        parser.add_argument("--scale", choices=SCALES, default="smoke", help="how much of it (default: smoke)")
        parser.add_argument("--work-dir", type=Path, help="trained models and caches (default: runs/benchmarks/SCALE)")
        parser.add_argument("--results", type=Path, help="JSON, table and picture (default: docs/results/SCALE)")
        parser.add_argument(
            "--dtype",
            choices=("auto", *DTYPES),
            default="auto",
            help="what trained models are evaluated in (default: auto, bfloat16 where the device is fast in it)",
        )
        if self.add_options:
            self.add_options(parser)
        options = argparse.Namespace(**check_options(vars(parser.parse_args(arguments))))
        options.work_dir = (options.work_dir or Path("runs/benchmarks") / options.scale).resolve()
        default = options.work_dir if options.scale == "smoke" else RESULTS / options.scale
        options.results = options.results or default
        set_cpu_threads()
        made_with, started = environment(), time.monotonic()  # before it writes anything: the commit is told clean
        results = self.run(options)
        if results is None or not PartialState().is_main_process:
            return
        seconds = {"seconds": time.monotonic() - started}
        seconds |= {key: results.pop(key) for key in ("seconds", "training_seconds") if key in results}
        record = {
            "benchmark": self.name,
            "scale": options.scale,
            "date": date.today().isoformat(),
            **{key: round(value, 1) for key, value in seconds.items()},
            "environment": made_with,
            "results": results,
        }
        with atomic_write(options.results / f"{self.name}.json") as path:
            path.write_text(from_repository(json.dumps(record, indent=1)) + "\n")
        record = read_record(options.results / f"{self.name}.json")
        text = self.render(record, options.results)
        Console().print(Markdown(text))
        print(f"{options.results / self.name}.json", file=sys.stderr)

    def render(self, record: dict[str, Any], folder: Path) -> str:
        """NAME.md and NAME.png in `folder` from a record; returns the Markdown."""
        results = record["results"]
        text = f"{self.tables(results)}\n\n{_provenance(record)}\n"
        with atomic_write(folder / f"{self.name}.md") as path:
            path.write_text(text)
        if self.plot:
            with atomic_write(folder / f"{self.name}.png") as path:
                self.plot(results, path)
        return text


def read_record(path: Path) -> dict[str, Any]:
    """Read a record; keys of older records get their present names."""
    text = (
        path.read_text()
        .replace("colour", "color")
        .replace('"centre"', '"center"')
        .replace("utilisation", "utilization")
    )
    return json.loads(re.sub(r'(psnr_|ssim_|lpips_|")shrunk"', r'\1downsample"', text))


def from_repository(text: str) -> str:
    """Paths below the repository, and beside it, as seen from it: a record is for other machines too.

    Only whole paths are replaced: the same folders may occur in the middle of another path.
    """
    text = _replace_path(text, f"{REPOSITORY}/", "")
    beside = REPOSITORY.parent
    return _replace_path(text, f"{beside}/", "../") if beside.name else text


def _replace_path(text: str, path: str, by: str) -> str:
    """Replace `path` where it begins one: after a blank (of JSON, too), a quote, a bracket or one of =:,;|."""
    return re.sub(r"""(?:(?<![^\s"'`=:,;|(\[{<])|(?<=\\[nrt]))""" + re.escape(path), lambda _: by, text)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; floats with four significant digits, None as an empty cell."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and half the range of a few runs' values: "24.31 ± 0.12"; of one run the value alone."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def dot_chart(path: Path, groups: dict[str, dict[str, Sequence[float]]], one_unit: bool = True) -> None:
    """PNG with a panel per group: a row per name, a dot for each of its values and a bar at their mean.

    Args:
        one_unit: all panels span as much, so that the same distance is the same difference in all of them.
    """
    from matplotlib.figure import Figure

    ranges = {title: [value for values in rows.values() for value in values] for title, rows in groups.items()}
    spans = {title: 1.25 * (max(values) - min(values)) or 1.0 for title, values in ranges.items()}
    height = 0.9 + 0.38 * max(map(len, groups.values()))
    figure = Figure(figsize=(2.6 * len(groups) + 2.2, height), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    before: list[str] = []
    for axes, (title, rows) in zip(panels, groups.items(), strict=True):
        for place, values in enumerate(rows.values()):
            axes.plot(sum(values) / len(values), place, "|", color="#1e3a8a", ms=15, mew=2)
            axes.plot(values, [place] * len(values), "o", color="#2563eb", alpha=0.55, ms=6, mew=0)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        middle = (max(ranges[title]) + min(ranges[title])) / 2
        span = max(spans.values()) if one_unit else spans[title]
        axes.set_xlim(middle - span / 2, middle + span / 2)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if list(rows) == before:
            axes.set_yticklabels([])
        before = list(rows)
    figure.savefig(path)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _provenance(record: dict[str, Any]) -> str:
    e = record["environment"]
    versions = ", ".join(f"{name} {e[name]}" for name in ("torch", "diffusers", "accelerate") if name in e)
    trained = f", after {record['training_seconds'] / 60:.1f} of training" if record.get("training_seconds") else ""
    command = e["command"].replace(".py", "", 1)  # older records: NAME.py and its options
    return (
        f"`python -m benchmarks.{command}`, {record['date']}, {record['seconds'] / 60:.1f} minutes{trained} on "
        f"{e['device']}; commit {e['git commit']}, {versions}."
    )
