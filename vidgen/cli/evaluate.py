"""`vidgen evaluate`: measures of videos, beside those of real ones."""

from __future__ import annotations

import argparse

from .options import add_command

VIDEOS = "a folder of videos or of class folders, or a CSV with the columns path,label"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "evaluate",
        "flicker, motion, sharpness and warping error of videos, PSNR and SSIM of pairs",
        "Measures every video and writes a CSV. With a reference of real videos each measure is shown beside its "
        "value there; if both sides have the same file names, pairs are compared too.",
    )
    parser.add_argument("videos", metavar="VIDEOS", help=VIDEOS)
    parser.add_argument("--reference", metavar="REAL", help=f"real videos, or originals: {VIDEOS}")
    parser.add_argument("--fps", type=float, help="measure all videos at this frame rate (default: that of each)")
    parser.add_argument("--size", type=int, help="resize the short side to this many pixels (default: that of each)")
    parser.add_argument(
        "--warping-error",
        action=argparse.BooleanOptionalAction,
        help="measure along the optical flow, which takes most of the time (default: if OpenCV is installed)",
    )
    parser.add_argument("--output", default="evaluation.csv", metavar="FILE", help="the CSV to write")
    parser.add_argument("--vbench", metavar="FOLDER", help="also copy VIDEOS to this folder in the layout of VBench")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the CSV and print the summary."""
    from rich.console import Console
    from rich.table import Table

    from ..metrics.video_evaluation import evaluate_videos, export_vbench

    evaluation = evaluate_videos(
        options.videos,
        options.reference,
        fps=options.fps,
        size=options.size,
        warping_error=options.warping_error,
    )
    path = evaluation.write_csv(options.output)
    table = Table(title="means over videos, with 95 % intervals", title_justify="left")
    for column in ("measure", "videos", "reference", "gap"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for row in evaluation.summarize():
        gap = "" if row["gap"] is None else f"{row['gap']:+.1%}"
        table.add_row(row["measure"], _format(row["videos"]), _format(row["reference"]), gap)
    Console(highlight=False).print(table)
    for video, reason in evaluation.skipped:
        print(f"left out {video}: {reason}")
    for note in evaluation.notes:
        print(f"note: {note}")
    print(path)
    if options.vbench:
        print(f"{len(export_vbench(options.videos, options.vbench))} videos in {options.vbench}")


def _format(value: dict | None) -> str:
    if value is None:
        return ""
    interval = "" if value["low"] is None else f" ({value['low']:.4g} to {value['high']:.4g})"
    return f"{value['mean']:.4g}{interval}"
