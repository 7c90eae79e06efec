"""Evaluation of folders of videos: measures of every video beside those of real ones, and of pairs of videos."""

from __future__ import annotations

import csv
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError
from ..common.io import atomic_dir, atomic_write
from ..common.progress import progress
from ..data.listing import list_videos, relative_path
from ..data.streams import FrameReader
from ..data.types import ShardMember
from .evaluation import evaluate_pairs
from .optical_flow import MIN_SIDE, MISSING, has_optical_flow, measure_flow
from .stats import mean_interval
from .video_measures import MEASURES, measure_video

VIDEOS, REFERENCE = "videos", "reference"
COLUMNS = ("set", "path", "frames", "fps", "width", "height", *MEASURES)
VBENCH_SUFFIXES = (".mp4", ".gif")


@dataclass(frozen=True)
class VideoEvaluation:
    """Measures of videos.

    Attributes:
        rows: one for each video: `set` ("videos" or "reference"), `path` below its root, `frames`, `fps`, `width`,
            `height`, the measures of `VideoMeasures` and, with optical flow, of `FlowMeasures`, and for the videos of
            pairs `psnr`, `psnr_frame` and `ssim`.
        skipped: (path, reason) of the videos that could not be read.
        notes: sentences on what limits the comparison, or why there are no pairs.
    """

    rows: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)

    def summarize(self) -> list[dict[str, Any]]:
        """The mean of each measure over videos, with its 95 % interval, beside that of the reference.

        Returns:
            For each measure `measure`, `videos` and `reference`, each {"mean", "low", "high", "num_videos"} or None
            without such videos, and `gap`, the relative difference of the means to the reference, or None.
        """
        names = list(dict.fromkeys(name for row in self.rows for name in row if name not in COLUMNS[:6]))
        summary = []
        for name in names:
            sides = {side: self._mean(side, name) for side in (VIDEOS, REFERENCE)}
            both = all(sides.values()) and sides[REFERENCE]["mean"]
            gap = sides[VIDEOS]["mean"] / sides[REFERENCE]["mean"] - 1 if both else None
            summary.append({"measure": name, **sides, "gap": gap})
        return summary

    def _mean(self, side: str, name: str) -> dict[str, Any] | None:
        values = [row[name] for row in self.rows if row["set"] == side and name in row]
        if not values:
            return None
        low, high = mean_interval(values)
        return {"mean": float(np.mean(values)), "low": low, "high": high, "num_videos": len(values)}

    def write_csv(self, path: str | os.PathLike) -> Path:
        """Write one line for each video."""
        columns = list(dict.fromkeys([*COLUMNS, *(name for row in self.rows for name in row)]))
        with atomic_write(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return Path(path)


def evaluate_videos(
    videos: str | os.PathLike,
    reference: str | os.PathLike | None = None,
    *,
    fps: float | None = None,
    size: int | None = None,
    warping_error: bool | None = None,
) -> VideoEvaluation:
    """Measure videos, and real ones for comparison; pairs of equal names are also compared pixel by pixel.

    Args:
        videos, reference: as `list_videos` takes them.
        fps, size: frame rate and short side at which all videos are measured; by default those of each file. Pairs are
            compared at the rate and size of the files.
        warping_error: whether to measure along the optical flow, which takes most of the time; None: if OpenCV is
            installed.

    Raises:
        UserError: if there are no videos, none of them can be read, or the warping error is set and OpenCV is missing.
    """
    rows, skipped, notes = [], [], []
    if warping_error is None and not has_optical_flow():
        notes.append(f"The warping error is not measured: {MISSING}.")
    elif warping_error and not has_optical_flow():
        raise UserError(f"the warping error cannot be measured: {MISSING}.")
    with_flow = warping_error is not False and has_optical_flow()
    for side, root in ((VIDEOS, videos), (REFERENCE, reference)):
        if root is not None:
            side_rows, side_skipped = _measure_set(side, root, fps, size, with_flow)
            rows, skipped = rows + side_rows, skipped + side_skipped
    evaluation = VideoEvaluation(rows, skipped, notes)
    if reference is not None:
        notes += _compare_formats(rows)
        try:
            _add_pairs(rows, videos, reference)
        except UserError as error:
            notes.append(f"No pairs are compared: {error}")
    return evaluation


def _measure_set(
    side: str, root: str | os.PathLike, fps: float | None, size: int | None, with_flow: bool
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    rows, skipped = [], []
    for file in progress(list_videos(root)[0], f"measuring {side}"):
        path = relative_path(file.path, root)
        try:
            if isinstance(file.path, ShardMember):
                raise UserError("it is in a shard; unpack the shards")
            with FrameReader(file.path, fps=fps, size=size) as reader:
                facts = (side, path, reader.num_frames, float(reader.fps), reader.width, reader.height)
                measures = asdict(measure_video(reader))
                if with_flow and min(reader.width, reader.height) >= MIN_SIDE:
                    measures |= asdict(measure_flow(reader))
        except UserError as error:
            skipped.append((str(file.path), getattr(error, "reason", str(error))))
            continue
        rows.append(dict(zip(COLUMNS, facts, strict=False)) | measures)
    if not rows:
        raise UserError(f"{root}: no video can be measured; the first is {': '.join(skipped[0])}")
    return rows, skipped


def _compare_formats(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on sizes and frame rates that differ, on which all measures depend."""
    notes = []
    for name, option in (("fps", "--fps"), ("height", "--size"), ("width", "--size")):
        values = sorted({round(row[name], 3) for row in rows})
        if len(values) > 1:
            notes.append(f"The {name} of the videos is {values[0]:g} to {values[-1]:g}; {option} measures all at one.")
    return notes


def _add_pairs(rows: Sequence[dict[str, Any]], videos: str | os.PathLike, reference: str | os.PathLike) -> None:
    """Add the means over the clips of a pair to the row of its video. Raises the errors of `evaluate_pairs`."""
    clips = evaluate_pairs(reference, videos)["clips"]
    by_name = defaultdict(list)
    for clip in clips:
        by_name[Path(relative_path(Path(clip["path"]), reference)).with_suffix("")].append(clip)
    for row in rows:
        of_video = by_name.get(Path(row["path"]).with_suffix(""))
        if row["set"] == VIDEOS and of_video:
            row |= {
                name: float(np.mean([clip["uint8"][name] for clip in of_video]))
                for name in ("psnr", "psnr_frame", "ssim")
            }


def export_vbench(videos: str | os.PathLike, folder: str | os.PathLike) -> list[Path]:
    """Copy videos to the flat layout of VBench (Huang et al. 2024), PROMPT-INDEX.mp4, and return the copies.

    The prompt is the class of a video, or its file name without a class. Indices count the videos of a prompt from 0.

    Raises:
        UserError: if a video is neither .mp4 nor .gif, or in a shard.
    """
    files, classes = list_videos(videos)
    counts: dict[str, int] = defaultdict(int)
    names = []
    for path, label in files:
        if isinstance(path, ShardMember) or path.suffix.lower() not in VBENCH_SUFFIXES:
            raise UserError(f"{path}: VBench reads {' and '.join(VBENCH_SUFFIXES)} files; convert the video first.")
        prompt = (path.stem if label is None else classes[label]).replace("/", " ")
        names.append(f"{prompt}-{counts[prompt]}{path.suffix.lower()}")
        counts[prompt] += 1
    with atomic_dir(folder) as unfinished:
        unfinished.mkdir()
        for (path, _), name in zip(files, names, strict=True):
            shutil.copyfile(path, unfinished / name)
    return [Path(folder, name) for name in names]
