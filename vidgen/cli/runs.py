"""`vidgen runs`: a page that compares training runs."""

from __future__ import annotations

import argparse

from .options import add_command


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "runs",
        "compare training runs on one HTML page",
        "Shows the best validations, the differences of the configs and all curves of runs, finished or not, in one "
        "file without links to others.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run folder, or a folder of run folders")
    parser.add_argument("--output", default="runs.html", metavar="FILE", help="the page to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the page, and print where it is."""
    from ..training.run_folder import read_runs
    from ..training.runs_page import write_runs_page

    runs = read_runs(options.folders)
    path = write_runs_page(options.output, runs)
    print(f"{path}: {len(runs)} run{'s'[: len(runs) > 1]}")
