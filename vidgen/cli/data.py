"""Commands about datasets: shards, sprites and data check."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from .options import add_command

DATASET = "a folder of class folders or of videos, a CSV with the columns path,label, or shards"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the commands and their options."""
    shards = add_command(
        commands,
        "shards",
        "dataset -> WebDataset shards",
        "Writes tar files of the unchanged videos with their classes, and an index; data.root=FOLDER trains from "
        "them.",
    )
    shards.add_argument("root", metavar="DATASET", help=DATASET)
    shards.add_argument("folder", metavar="FOLDER", help="the folder to write")
    shards.add_argument(
        "--shard-size-mb", type=float, default=512, metavar="MB", help="maximum size of a shard (default: 512)"
    )
    shards.add_argument(
        "--max-count", type=int, default=10_000, metavar="N", help="maximum number of videos (default: 10000)"
    )
    shards.add_argument(
        "--ucf101-split", type=int, choices=(1, 2, 3), help="write FOLDER/train and FOLDER/test of UCF-101's split"
    )
    shards.add_argument(
        "--split-files", metavar="FOLDER", help="folder of UCF-101's split files (default: beside or in DATASET)"
    )
    shards.set_defaults(run=_write_shards)

    sprites = add_command(
        commands,
        "sprites",
        "procedural labeled dataset",
        "Writes class folders of .mp4 files of 64 x 64 pixels, eight motions, each with its factors in a .json file. "
        "The same seed gives the same clips, and a larger set begins with the smaller one.",
    )
    sprites.add_argument("folder", metavar="FOLDER", help="the folder to write; created if missing")
    sprites.add_argument("--clips-per-class", type=int, default=80, metavar="N", help="clips per motion (default: 80)")
    sprites.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    sprites.set_defaults(run=_write_sprites)

    data = add_command(commands, "data", "inspect a dataset")
    check = add_command(
        data.add_subparsers(required=True, metavar="COMMAND"),
        "check",
        "list unreadable, short and unusual videos",
        "Decodes every video of a dataset and writes a list of those that are unreadable, too short or unusual, with "
        "totals and histograms. A file that crashes or stalls the decoder is listed too.",
    )
    check.add_argument("root", metavar="DATASET", help=DATASET)
    check.add_argument(
        "--output", default="data-check", metavar="FOLDER", help="folder of list and histograms (default: %(default)s)"
    )
    check.add_argument("--num-frames", type=int, default=16, help="frames per clip (default: 16)")
    check.add_argument("--fps", type=float, default=8.0, help="frames per second of a clip (default: 8)")
    check.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    check.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="time limit per file (default: 60)"
    )
    check.set_defaults(run=_check_dataset)


def _write_shards(
    root: str,
    folder: str,
    shard_size_mb: float,
    max_count: int,
    ucf101_split: int | None,
    split_files: str | None,
) -> None:
    from ..common.progress import progress
    from ..data.dataset import list_videos
    from ..data.shards import write_shards
    from ..data.ucf101 import ucf101_split as read_split

    if ucf101_split is None:
        parts = {folder: list_videos(root, _print_to_stderr)}
    else:
        train, test, classes = read_split(root, ucf101_split, split_files)
        parts = {str(Path(folder, "train")): (train, classes), str(Path(folder, "test")): (test, classes)}
    for part, (files, classes) in parts.items():
        with progress(description=Path(part).name, total=len(files)) as bar:
            unreadable = write_shards(
                files,
                classes,
                part,
                shard_size_mb=shard_size_mb,
                max_count=max_count,
                report=lambda _, b=bar: b.update(),
            )
        for path, reason in unreadable:
            print(f"left out {path}: {reason}")
        print(f"{len(files) - len(unreadable)} videos in {len(list(Path(part).glob('*.tar')))} shards in {part}")


def _write_sprites(folder: str, clips_per_class: int, seed: int) -> None:
    from ..common.errors import UserError
    from ..data.sprites import write_sprites

    if clips_per_class < 1 or seed < 0:
        raise UserError(f"--clips-per-class must be 1 or more and --seed 0 or more, not {clips_per_class} and {seed}.")
    paths = write_sprites(folder, clips_per_class, seed=seed, show_progress=True)
    print(f"{len(paths)} clips in {folder}")


def _check_dataset(root: str, output: str, num_frames: int, fps: float, jobs: int | None, timeout: float) -> None:
    """Write OUTPUT/bad_videos.jsonl and OUTPUT/histograms.png, and print a table of totals."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..common.errors import UserError
    from ..common.plots import dataset_histograms
    from ..common.progress import progress
    from ..data.check import check_videos, write_reports
    from ..data.dataset import list_videos

    if num_frames < 1 or not 0 < fps < math.inf or not timeout > 0 or (jobs is not None and jobs < 1):
        raise UserError("--num-frames, --fps, --jobs and --timeout must be positive")
    files, classes = list_videos(root, _print_to_stderr)
    checks = check_videos([f.path for f in files], num_frames=num_frames, fps=fps, jobs=jobs, timeout=timeout)
    reports = list(progress(checks, description="checking", total=len(files)))
    list_path = write_reports(Path(output, "bad_videos.jsonl"), reports)

    # Totals by kind.
    table = Table(title=f"{root}: {len(files)} videos, {len(classes)} classes", title_justify="left")
    for column in ("", "videos", "hours", "example"):
        table.add_column(column, justify="right" if column in ("videos", "hours") else "left", overflow="fold")
    for kind in ("good", "odd", "short", "unreadable"):
        of_kind = [report for report in reports if report.kind == kind]
        first = min(of_kind, key=lambda report: report.path, default=None)
        example = "" if first is None or kind == "good" else escape(f"{first.path}: {first.reason}")
        table.add_row(kind, str(len(of_kind)), f"{sum(report.duration for report in of_kind) / 3600:.2f}", example)
    Console(highlight=False).print(table)
    print(list_path)

    if readable := [report for report in reports if report.kind != "unreadable"]:
        sizes = [min(report.width, report.height) for report in readable]
        durations, rates = [report.duration for report in readable], [report.fps for report in readable]
        print(dataset_histograms(Path(output, "histograms.png"), durations, sizes, rates))


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # stdout holds results
