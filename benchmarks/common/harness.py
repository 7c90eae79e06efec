"""Shared command-line harness of the benchmarks: common options, JSON records, and one Markdown page a benchmark.

A benchmark reproduces one table or figure of the paper at a `--scale`: `smoke` (seconds, for CI), `cpu` (models that
two cores can train) or `paper`. It writes the record SCALE/NAME.json (results, command, commit, versions) and its
pictures, and renders the page NAME.md from the records of all scales.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from accelerate import PartialState
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from vidgen.common.environment import environment, set_cpu_threads
from vidgen.common.errors import UserError, run_program
from vidgen.common.io import atomic_dir, atomic_write
from vidgen.common.options import check_options
from vidgen.common.precision import DTYPES
from vidgen.data.cache_source import describe_difference
from vidgen.data.sprites import write_sprites

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
SCALES = {
    "cpu": "On a CPU",
    "paper": "At the paper's scale",
    "smoke": "Smoke test: the numbers have no meaning",
}
HAND_WRITTEN = "<!-- `make results` generates the page above this line and keeps the text below it. -->"
# Programs that were merged or renamed after a record was written.
PROGRAMS = {
    "latent_roles": "disentanglement",
    "model_scaling": "ablations model_scaling",
    "rate_curve": "ablations rate_curve",
    "training_cost": "resources training_cost",
}
# Keys and labels of older records (regular expressions), and their present names.
RENAMED = {
    "colou(?=r)": "colo",
    "models/sprites": "pretrained/sprites",
    '"cent[r]e"': '"center"',
    "utilisation": "utilization",
    r'(psnr_|ssim_|lpips_|")shr[u]nk"': r'\1downsample"',
    '"reenactment":': '"latent_swap":',
    '"whose":': '"factor_attribution":',
    '"way":': '"interpolation":',
    '"drawn":': '"original":',
    '"scorer":': '"classifier":',
    '"together"': '"combined"',
    r'"own (\d)': r'"default \1',
    r"\bguided (\d)": r"guidance \1",
    '"again":': '"reference_repeated":',
    "share of the matmul rate": "fraction of matmul rate",
    '"(a clip )?of fp32\'s (time|peak)"': r'"\2 relative to fp32"',
    '"modulations given / made"': '"precomputed modulations, relative time"',
    "pipeline / sum of its parts": "pipeline / sum of parts",
    " / ours": " / VidTwin",
}
Results = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A table or figure of the paper.

    Args:
        name: of the record, the page and the pictures.
        title: heading of the page.
        run: maps options to results that JSON can hold, or to None if only a part was computed. Writes intermediate
            files to `options.work_dir` and extra pictures to `options.results` as NAME-*.png. May return `seconds`,
            which include earlier starts, and `training_seconds` of models that another benchmark may have trained.
            Runs on all processes; the results of the main process count.
        tables: renders results as Markdown, the paper's numbers next to ours.
        plot: draws results.
        add_options: adds options to the common ones.
        program: the module in `benchmarks`, where one program runs several benchmarks.
    """

    name: str
    title: str
    run: Callable[[argparse.Namespace], Results | None]
    tables: Callable[[Results], str]
    plot: Callable[[Results], Figure] | None = None
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    program: str | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run the benchmark on command-line arguments; a user's mistake is one sentence and exit code 2."""
        main(self, arguments=arguments)

    def section(self, record: Results, folder: Path) -> str:
        """Render one record as Markdown for the folder above `folder`, and draw its picture in `folder`."""
        if self.plot:
            with atomic_write(folder / f"{self.name}.png") as path:
                self.plot(record["results"]).savefig(path)
        paths = sorted([*folder.glob(f"{self.name}.png"), *folder.glob(f"{self.name}-*.png")])
        pictures = [f"![{path.stem}]({folder.name}/{path.name})" for path in paths]
        return "\n\n".join(
            [f"## {SCALES[record['scale']]}", self.tables(record["results"]), *pictures, _provenance(record)]
        )

    def write_page(self, folder: Path) -> Path:
        """Write FOLDER/NAME.md from the records FOLDER/SCALE/NAME.json; text below `HAND_WRITTEN` is kept."""
        page = folder / f"{self.name}.md"
        records = [path for scale in SCALES if (path := folder / scale / f"{self.name}.json").exists()]
        links = ", ".join(f"[{path.parent.name}/{path.name}]({path.parent.name}/{path.name})" for path in records)
        head = [f"# {self.title}", f"Raw data: {links}. [All results](README.md)."]
        sections = [self.section(read_record(path), path.parent) for path in records]
        _, _, remarks = (page.read_text() if page.exists() else "").partition(HAND_WRITTEN)
        with atomic_write(page) as path:
            path.write_text("\n\n".join([*head, *sections, f"{HAND_WRITTEN}{remarks.rstrip()}"]).rstrip() + "\n")
        return page


def main(*benchmarks: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """Run one benchmark of a program, chosen by its name if there are several; the first one is the default."""
    run_program(lambda: run_benchmark(*benchmarks, arguments=arguments))


def run_benchmark(*benchmarks: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """As `main`, but a user's mistake raises `UserError`."""
    first = benchmarks[0]
    program = first.program or first.name
    options = argparse.Namespace(**check_options(vars(build_parser(*benchmarks).parse_args(arguments))))
    benchmark = next(b for b in benchmarks if b.name == getattr(options, "study", first.name))

    # Resolve the folders.
    options.work_dir = (options.work_dir or Path("runs/benchmarks") / options.scale).resolve()
    options.results = (options.results or (options.work_dir if options.scale == "smoke" else RESULTS)) / options.scale

    # Run, with the environment as it was before anything was written.
    set_cpu_threads()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(benchmarks) == 1 and benchmark.name != program:
        words.insert(0, benchmark.name)
    used = environment() | {"command": shlex.join(["python", "-m", f"benchmarks.{program}", *words])}
    started = time.monotonic()
    results = benchmark.run(options)
    if results is None or not PartialState().is_main_process:
        return

    # Write the record and the page.
    seconds = {"seconds": time.monotonic() - started}
    seconds |= {key: results.pop(key) for key in ("seconds", "training_seconds") if key in results}
    record = {"benchmark": benchmark.name, "scale": options.scale, "date": date.today().isoformat()}
    record |= {key: round(value, 1) for key, value in seconds.items()}
    record |= {"environment": used, "results": results}
    path = options.results / f"{benchmark.name}.json"
    with atomic_write(path) as unfinished:
        unfinished.write_text(relative_to_repository(json.dumps(record, indent=1)) + "\n")
    Console().print(Markdown(benchmark.section(read_record(path), path.parent)))
    print(f"{path}\n{benchmark.write_page(options.results.parent)}", file=sys.stderr)


def compute_once(path: Path, settings: Any, compute: Callable[[], Any]) -> Any:
    """Return the score that a finished run left in `path`, or compute it on all processes and write it there.

    Raises:
        UserError: if the run had other settings; and everything that `compute` raises.
    """
    settings = json.loads(json.dumps(settings))  # as the file has them
    if path.exists():
        before = json.loads(path.read_text())["settings"]
        if before != settings:
            difference = describe_difference(before, settings) if isinstance(settings, dict) else None
            raise UserError(
                f"{path} was made with other settings: {difference or f'{before}, now {settings}'}; delete "
                f"{path.parent}, or choose another --work-dir."
            )
    else:
        score = compute()
        if PartialState().is_main_process:
            with atomic_write(path) as unfinished:
                unfinished.write_text(json.dumps({"settings": settings, "score": score}, indent=1))
        PartialState().wait_for_everyone()
    return json.loads(path.read_text())["score"]


def write_sprites_once(folder: Path, clips_per_class: int, **options: Any) -> Path:
    """Write sprites on the main process with `write_sprites`, unless the folder exists; returns it."""
    with PartialState().main_process_first():
        if not folder.exists():
            with atomic_dir(folder) as unfinished:
                write_sprites(unfinished, clips_per_class, **options)
    return folder


def digest(values: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def build_parser(*benchmarks: Benchmark) -> argparse.ArgumentParser:
    """The options of a program: the name of a benchmark if it has several, the common options, and those it adds."""
    first = benchmarks[0]
    prog = f"python -m benchmarks.{first.program or first.name}"
    parser = argparse.ArgumentParser(prog=prog, description=first.title)
    if len(benchmarks) > 1:
        names = [benchmark.name for benchmark in benchmarks]
        parser.add_argument("study", nargs="?", choices=names, default=first.name, help=f"default: {first.name}")
    parser.add_argument("--scale", choices=("smoke", "cpu", "paper"), default="smoke", help="size (default: smoke)")
    parser.add_argument("--work-dir", type=Path, help="trained models and caches (default: runs/benchmarks/SCALE)")
    parser.add_argument("--results", type=Path, help="pages and records (default: docs/results; smoke: WORK_DIR)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="precision of evaluation (default: auto, which is bfloat16 where the device is fast in it)",
    )
    if first.add_options:
        first.add_options(parser)
    return parser


def read_record(path: Path) -> Results:
    """Read a record; keys, labels and commands of older records get their present names."""
    text = path.read_text()
    for old, new in RENAMED.items():
        text = re.sub(old, new, text)
    record = json.loads(text)
    program, script, rest = record["environment"]["command"].partition(".py")
    if script and " " not in program:  # older records: NAME.py and its options
        record["environment"]["command"] = f"python -m benchmarks.{PROGRAMS.get(program, program)}{rest}"
    return record


def relative_to_repository(text: str) -> str:
    """Make paths in the repository, and next to it, relative to it, so that records hold on other machines.

    Only whole paths are replaced: the same folders may occur in the middle of another path.
    """
    text = _replace_path(text, f"{REPOSITORY}/", "")
    parent = REPOSITORY.parent
    return _replace_path(text, f"{parent}/", "../") if parent.name else text


def _replace_path(text: str, path: str, by: str) -> str:
    """Replace `path` where it begins a path: after white space (also in JSON), a quote, a bracket or one of =:,;|."""
    return re.sub(r"""(?:(?<![^\s"'`=:,;|(\[{<])|(?<=\\[nrt]))""" + re.escape(path), lambda _: by, text)


def _provenance(record: Results) -> str:
    used = record["environment"]
    versions = ", ".join(f"{name} {used[name]}" for name in ("torch", "diffusers", "accelerate") if name in used)
    minutes = f"{record['seconds'] / 60:.1f} minutes"
    if record.get("training_seconds"):
        minutes += f" after {record['training_seconds'] / 60:.1f} minutes of training"
    return (
        f"Command: `{used['command']}` ({record['date']}, {minutes} on {used['device']}; "
        f"commit {used['git commit']}, {versions})."
    )
