"""The videos of the comparison: one list each for training, for choosing learning rates, and for the scores."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState

from vidgen.common.errors import UserError
from vidgen.common.io import atomic_write
from vidgen.data.dataset import ClipDataset
from vidgen.data.listing import list_videos
from vidgen.data.video import VideoError, probe

from ..common.harness import write_sprites_once

FPS = {"smoke": 4, "cpu": 8, "paper": 25}
SIDE = {"smoke": 32, "cpu": 64, "paper": 224}
NUM_FRAMES = {"smoke": 4, "cpu": 16, "paper": 16}  # that are scored
CLIPS_PER_VIDEO = {"smoke": 1, "cpu": 2, "paper": 4}  # that are scored
VALIDATION_INTERVAL = 10  # of the training videos every tenth one is left out, to choose learning rates
LISTS = ("train", "validation", "test")
Rows = list[list[str]]  # path, class


def write_lists(
    train: Sequence[Path], test: Sequence[Path], folder: Path, fps: float, num_frames: int
) -> dict[str, Path]:
    """Write the three lists, as CSV files with absolute paths and classes.

    Videos too short for `num_frames` frames are left out, so that all methods see the same ones.

    Args:
        train, test: roots as in `list_videos`.
        folder: of the lists.
        fps: rate of the frames.
        num_frames: the most that a method reads.

    Raises:
        UserError: if a root cannot be listed, or no video is long enough.
    """
    lists = {name: folder / f"{name}.csv" for name in LISTS}
    if PartialState().is_main_process:
        rows, scored = (list_long_videos(roots, fps, num_frames) for roots in (train, test))
        held_out = slice(VALIDATION_INTERVAL // 2, None, VALIDATION_INTERVAL)
        write_list(lists["validation"], rows[held_out] or rows[:1])
        del rows[held_out]
        write_list(lists["train"], rows)
        write_list(lists["test"], scored)
    PartialState().wait_for_everyone()
    return lists


def list_long_videos(roots: Sequence[Path], fps: float, num_frames: int) -> Rows:
    """Absolute path and class of each video that has `num_frames` frames at a rate.

    Raises:
        UserError: if there is none, or videos are not files: members of shards or arrays.
    """
    rows = []
    for root in roots:
        files, classes = list_videos(root)
        if not all(isinstance(path, Path) for path, _ in files):
            raise UserError(f"{root} has shards or arrays: give a folder or a CSV list of video files.")
        for path, label in files:
            try:
                probe(path).latest_start(fps=fps, num_frames=num_frames)
            except VideoError:
                continue
            rows.append([str(Path(path).resolve()), "" if label is None else classes[label]])
    if not rows:
        raise UserError(f"no video in {', '.join(map(str, roots))} has {num_frames} frames at {fps:g} fps.")
    return rows


def write_list(table: Path, rows: Rows) -> None:
    """Write a CSV file of videos, with their classes if they have some."""
    labeled = any(label for _, label in rows)
    with atomic_write(table) as path, path.open("w", newline="") as file:
        columns = 1 + labeled
        csv.writer(file).writerows([["path", "label"][:columns], *(row[:columns] for row in rows)])


def write_smoke_videos(folder: Path) -> tuple[list[Path], list[Path]]:
    """Write a few sprites for training and for the scores, unless they exist; returns their roots."""
    roots = [folder / "sprites" / part for part in ("train", "test")]
    for seed, (root, count) in enumerate(zip(roots, (2, 1), strict=True)):
        write_sprites_once(root, count, seed=seed, resolution=32)
    return [roots[0]], [roots[1]]


def scored_clips(
    root: Path, scale: str, side: int | None = None, num_frames: int | None = None, fps: float | None = None
) -> ClipDataset:
    """The clips of a list or folder that every method is scored on, by default of the scale's size and rate."""
    shape = (num_frames or NUM_FRAMES[scale], fps or FPS[scale], side or SIDE[scale])
    return ClipDataset(root, *shape, train=False, clips_per_video=CLIPS_PER_VIDEO[scale])
