"""`vidgen fvd`: distances between two sets of videos."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from .options import add_command

if TYPE_CHECKING:
    from ..metrics.compare import VideoDistance

VIDEOS = "a folder of videos, a CSV with a column path, shards, or a .npy or .npz file of uint8 videos"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "fvd",
        "distance between real and generated videos",
        "Measures the Fréchet video distance, or the MMD, of FAKE to REAL with intervals, beside that of real videos "
        "to other real ones. Features are cached, so an interrupted command continues, and `accelerate launch -m "
        "vidgen fvd` uses all devices.",
    )
    parser.add_argument("real", metavar="REAL", help=VIDEOS)
    parser.add_argument("fake", metavar="FAKE", help=VIDEOS)
    parser.add_argument("--protocol", default="folders", help="which clips are compared, and how they are prepared")
    parser.add_argument(
        "--detector",
        action="append",
        metavar="NAME_OR_PATH",
        help="a name, the weights of the protocol's detector, or NAME=FILE; vjepa2=, videomae= and clip= take a "
        "folder or a name on the Hub; repeatable (default: the protocol's)",
    )
    parser.add_argument("--detector-sha256", metavar="HASH", help="hash of its file, if not the published one")
    parser.add_argument(
        "--distance",
        action="append",
        choices=("frechet", "mmd"),
        help="squared Fréchet distance, or unbiased squared MMD; repeatable (default: frechet)",
    )
    parser.add_argument("--num-real", type=int, metavar="N", help="real clips (default: the protocol's)")
    parser.add_argument(
        "--num-fake", type=int, metavar="N", help="fake clips, drawn at random (default: the protocol's, or all)"
    )
    parser.add_argument(
        "--fake-clips",
        choices=("first", "protocol"),
        help="first frames of each FAKE video, or cut as REAL ones (default: first, if the protocol sets a number)",
    )
    parser.add_argument("--split-files", metavar="FOLDER", help="UCF-101's lists: use the protocol's split of REAL")
    parser.add_argument("--batch-size", type=int, default=16, help="clips per batch of each process")
    parser.add_argument("--num-workers", type=int, default=0, help="processes of each process that read videos")
    parser.add_argument("--work-dir", default="runs/fvd", metavar="FOLDER", help="folder of cached features")
    parser.add_argument("--output", metavar="FILE.json", help="write the results with all settings")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the distances with their intervals")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print a table, and write the files."""
    from accelerate import Accelerator

    from ..common.environment import set_cpu_threads
    from ..metrics.compare import compare_videos
    from ..metrics.detector_options import parse_detectors
    from ..metrics.distance_reports import write_distances, write_plot
    from ..metrics.protocols import get_protocol

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        set_cpu_threads()
    protocol = get_protocol(options.protocol)
    detectors = parse_detectors(options.detector or [protocol.detector], protocol.detector, options.detector_sha256)
    results = compare_videos(
        options.real,
        options.fake,
        protocol,
        [detector.to(accelerator.device) for detector in detectors],
        accelerator,
        folder=options.work_dir,
        distances=list(dict.fromkeys(options.distance or ["frechet"])),
        num_real=options.num_real,
        num_fake=options.num_fake,
        fake_clips=options.fake_clips,
        split_files=options.split_files,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        report=(lambda text: print(text, file=sys.stderr)) if accelerator.is_main_process else None,
    )
    if results is None:
        return
    _print_results(results)
    for path, write in ((options.output, write_distances), (options.plot, write_plot)):
        if path is not None:
            print(write(path, results))


def _print_results(results: list[VideoDistance]) -> None:
    """Print a table of the distances; below it the detectors, the notes, and the files that were left out."""
    from rich.console import Console
    from rich.table import Table

    from ..metrics.distance_reports import describe_detector, format_estimate

    table = Table(title=f"protocol {results[0].protocol}", title_justify="left")
    for column in ("detector", "distance", "value (95 % interval)", "real vs. real", "clips (fake / real)"):
        table.add_column(column, overflow="fold")
    for result in results:
        counts = f"{result.num_fake} / {result.num_real}"
        noise = "" if result.real_vs_real is None else format_estimate(result.real_vs_real)
        table.add_row(result.detector, result.distance, format_estimate(result), noise, counts)
    Console(highlight=False).print(table)
    for result in {result.detector: result for result in results}.values():
        print(describe_detector(result.detector_details))
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"note: {note}")
    for side, entries in results[0].unreadable.items():
        for path, reason in entries:
            print(f"left out of {side}: {path}: {reason}")
