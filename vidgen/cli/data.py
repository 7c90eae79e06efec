"""Commands about datasets: shards, sprites and data check."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from .options import add_command

DATASET = "a folder of class folders or of videos, a CSV with the columns path,label,caption, or shards"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the commands and their options."""
    shards = add_command(
        commands,
        "shards",
        "dataset -> WebDataset shards",
        "Writes tar files of the unchanged videos with their classes and captions, and an index; "
        "data.root=FOLDER trains from them.",
    )
    shards.add_argument("root", metavar="DATASET", help=DATASET)
    shards.add_argument("folder", metavar="FOLDER", help="the folder to write")
    shards.add_argument("--shard-size-mb", type=float, default=512, metavar="MB", help="size at which a shard is full")
    shards.add_argument("--max-count", type=int, default=10_000, metavar="N", help="videos at which a shard is full")
    shards.add_argument(
        "--ucf101-split", type=int, choices=(1, 2, 3), help="write FOLDER/train and FOLDER/test of UCF-101's split"
    )
    shards.add_argument("--split-files", metavar="FOLDER", help="UCF-101's lists (default: beside or in DATASET)")
    shards.set_defaults(run=convert_to_shards)

    sprites = add_command(
        commands,
        "sprites",
        "procedural labeled dataset",
        "Writes class folders of .mp4 files of 64 x 64 pixels, eight motions, each with its factors in a .json file. "
        "The same seed gives the same clips, and a larger set begins with the smaller one.",
    )
    sprites.add_argument("folder", metavar="FOLDER", help="the folder to write; created if missing")
    sprites.add_argument("--clips-per-class", type=int, default=80, metavar="N", help="clips per motion")
    sprites.add_argument(
        "--num-frames",
        type=int,
        default=16,
        metavar="N",
        help="frames per clip; motions repeat every 16 frames, so that windows of longer clips begin anywhere in them",
    )
    sprites.add_argument("--seed", type=int, default=0, help="random seed")
    sprites.add_argument(
        "--captions",
        action="store_true",
        help="also write captions_seen.csv and captions_held_out.csv (path,label,caption)",
    )
    sprites.set_defaults(run=draw_sprites)

    data = add_command(commands, "data", "inspect a dataset")
    check = add_command(
        data.add_subparsers(required=True, metavar="COMMAND"),
        "check",
        "list unreadable, short and unusual videos",
        "Decodes every video of a dataset and writes a list of those that are unreadable, too short or unusual, with "
        "totals and histograms, and counts missing and empty captions. A file that crashes or stalls the "
        "decoder is listed too.",
    )
    check.add_argument("root", metavar="DATASET", help=DATASET)
    check.add_argument("--output", default="data-check", metavar="FOLDER", help="folder of list and histograms")
    check.add_argument("--num-frames", type=int, default=16, help="frames per clip")
    check.add_argument("--fps", type=float, default=8.0, help="frames per second of a clip")
    check.add_argument("--jobs", type=int, metavar="N", help="processes (default: one per core)")
    check.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="time limit per file")
    check.set_defaults(run=check_dataset)


def convert_to_shards(options: argparse.Namespace) -> None:
    """Write a dataset, or both parts of a UCF-101 split, as shards."""
    from ..common.progress import progress
    from ..data.captions import read_captions
    from ..data.listing import list_videos
    from ..data.shards import write_shards
    from ..data.ucf101 import ucf101_split

    folder = options.folder
    limits = {"shard_size_mb": options.shard_size_mb, "max_count": options.max_count}
    if options.ucf101_split is None:
        parts = {folder: list_videos(options.root, _print_to_stderr)}
    else:
        train, test, classes = ucf101_split(options.root, options.ucf101_split, options.split_files)
        parts = {str(Path(folder, "train")): (train, classes), str(Path(folder, "test")): (test, classes)}
    for part, (files, classes) in parts.items():
        captions = read_captions(options.root, files)
        with progress(description=Path(part).name, total=len(files)) as bar:
            unreadable = write_shards(
                files, classes, part, **limits, captions=captions, report=lambda _, b=bar: b.update()
            )
        for path, reason in unreadable:
            print(f"left out {path}: {reason}")
        print(f"{len(files) - len(unreadable)} videos in {len(list(Path(part).glob('*.tar')))} shards in {part}")


def draw_sprites(options: argparse.Namespace) -> None:
    """Write the sprites dataset."""
    from ..common.errors import UserError
    from ..data.sprite_captions import HELD_OUT, SEEN, write_captions
    from ..data.sprites import PERIOD, write_sprites

    clips, seed = options.clips_per_class, options.seed
    if clips < 1 or seed < 0:
        raise UserError(f"--clips-per-class must be 1 or more and --seed 0 or more, not {clips} and {seed}.")
    frames = options.num_frames
    if frames < 1:
        raise UserError(f"--num-frames must be 1 or more, not {frames}.")
    paths = write_sprites(options.folder, clips, seed=seed, num_frames=frames, period=PERIOD, show_progress=True)
    print(f"{len(paths)} clips in {options.folder}")
    if options.captions:
        seen, held_out = write_captions(options.folder, paths)
        print(f"{seen} captioned in {SEEN}, {held_out} of held-out compositions in {HELD_OUT}")


def check_dataset(options: argparse.Namespace) -> None:
    """Write OUTPUT/bad_videos.jsonl and OUTPUT/histograms.png, and print a table of totals."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..common.errors import UserError
    from ..common.plots import dataset_histograms
    from ..common.progress import progress
    from ..data.captions import read_captions, summarize_captions
    from ..data.check import check_videos, write_reports
    from ..data.listing import list_videos

    clip = {"num_frames": options.num_frames, "fps": options.fps}
    limits = {"jobs": options.jobs, "timeout": options.timeout}
    if not all(value is None or 0 < value < math.inf for value in (*clip.values(), *limits.values())):
        raise UserError("--num-frames, --fps, --jobs and --timeout must be positive")
    files, classes = list_videos(options.root, _print_to_stderr)
    captions = summarize_captions(files, read_captions(options.root, files))
    checks = check_videos([file.path for file in files], **clip, **limits)
    reports = list(progress(checks, description="checking", total=len(files)))
    list_path = write_reports(Path(options.output, "bad_videos.jsonl"), reports)

    # Totals by kind.
    table = Table(title=f"{options.root}: {len(files)} videos, {len(classes)} classes", title_justify="left")
    for column in ("", "videos", "hours", "example"):
        table.add_column(column, justify="right" if column in ("videos", "hours") else "left", overflow="fold")
    for kind in ("good", "odd", "short", "unreadable"):
        of_kind = [report for report in reports if report.kind == kind]
        first = min(of_kind, key=lambda report: report.path, default=None)
        example = "" if first is None or kind == "good" else escape(f"{first.path}: {first.reason}")
        table.add_row(kind, str(len(of_kind)), f"{sum(report.duration for report in of_kind) / 3600:.2f}", example)
    Console(highlight=False).print(table)
    print(captions)
    print(list_path)

    if readable := [report for report in reports if report.kind != "unreadable"]:
        sizes = [min(report.width, report.height) for report in readable]
        durations, rates = [report.duration for report in readable], [report.fps for report in readable]
        print(dataset_histograms(Path(options.output, "histograms.png"), durations, sizes, rates))


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # stdout holds results
