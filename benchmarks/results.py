"""docs/results.md and its pictures, from the JSON files in docs/results: what `make results` runs.

    python -m benchmarks.results

First what came out, by hand, in summary.md. Then a section for every benchmark: at the scale of the paper, or what it
would take, and at the scale of this machine; with what was said of it, if NAME-remarks.md lies beside its record.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from vidgen.common.io import atomic_write

from .common.harness import RESULTS, Benchmark, read_record

PROGRAMS = (
    "reconstruction",
    "ucf101_fvd",
    "sprites",
    "sampling",
    "patch_sizes",
    "ablations",
    "model_scaling",
    "rate_curve",
    "resources",
    "latent_roles",
    "speed",
    "training_cost",
)
HEAD = """# Results

The paper's tables and figures, ours beside them. Made by `make results` from the files in `docs/results/`: each holds
its figures, the command, the time it took and all versions. What numbers mean and can't: [evaluation](evaluation.md).

`--scale paper` is the paper's setting. `--scale cpu` is what a CPU can do in minutes a model: tiny models of 64 x 64
pixels on [sprites](data.md#sprites) and on eleven real videos, three of them scored on. Its numbers show which of the
paper's orderings come out; their height can't be compared with the paper's.
"""
SCALES = {"cpu": "On a CPU", "paper": "At the paper's scale"}


def main() -> None:
    sections = [HEAD, (RESULTS / "summary.md").read_text().strip()]
    for program in PROGRAMS:
        benchmark: Benchmark = _benchmark(program)
        sections.append(f"## {benchmark.title}")
        sections += [section(benchmark, scale, title) for scale, title in SCALES.items()]
    with atomic_write(RESULTS.parent / "results.md") as path:
        path.write_text("\n\n".join(sections) + "\n")


def _benchmark(name: str) -> Benchmark:
    package = name in ("sprites", "speed")
    return importlib.import_module(f"benchmarks.{name}.__main__" if package else f"benchmarks.{name}").BENCHMARK


def section(benchmark: Benchmark, scale: str, title: str, results: Path = RESULTS) -> str:
    """A benchmark at a scale, as Markdown for the folder above `results`; its table and picture are made again."""
    record = results / scale / f"{benchmark.name}.json"
    if not record.exists():
        why = f"not run: needs {benchmark.needs}" if scale == "paper" else "not run yet"
        text = below(benchmark.tables(None)) if scale == "paper" else ""
        return f"### {title}\n\n{why}.\n\n{text}".rstrip()
    text = below(benchmark.render(read_record(record), record.parent))
    pictures = sorted(record.parent.glob(f"{benchmark.name}*.png"))
    shown = "\n\n".join(f"![{path.stem}]({results.name}/{scale}/{path.name})" for path in pictures)
    remarks = record.with_name(f"{benchmark.name}-remarks.md")
    said = remarks.read_text() if remarks.exists() else ""
    return "\n\n".join(part.strip() for part in (f"### {title}", text, shown, said) if part)


def below(text: str) -> str:
    """Markdown whose headings stand below a section's."""
    return re.sub("^#", "##", text, flags=re.MULTILINE)


if __name__ == "__main__":
    main()
