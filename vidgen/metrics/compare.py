"""Distances between two sets of videos that anybody made: `vidgen fvd REAL FAKE`.

    results = compare_videos("UCF-101", "samples", get_protocol("tats"), [get_detector("i3d")], Accelerator(),
                             folder="runs/fvd", distances=("frechet", "mmd"))

Real clips are those of `vidgen.metrics.fvd.evaluate_pipeline`. A generated clip is the first frames of a FAKE video,
in the order of the videos. The samples of a pipeline that were saved without loss, in the order of their numbers and
in the protocol's size, therefore give the pipeline's distance exactly. Of more FAKE videos than are used, a random
selection is used, because files are often sorted by class.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..common.environment import environment
from ..common.errors import UserError
from ..data.listing import content_hash, find_videos, list_videos
from ..data.types import VideoFile
from ..data.video_arrays import find_arrays, list_array_videos
from .detectors import Detector, refuse_duplicates
from .features import SHARD_SIZE, Clips, Collector, FeatureSet
from .frechet import FeatureStatistics
from .fvd import extrapolate, list_protocol_caveats, list_rank_caveats, measure_distance, split_real
from .mmd import mmd, mmd_interval
from .protocols import Protocol
from .real_clips import RealClips, Window, draw_windows, first_windows, protocol_videos

DISTANCES = ("frechet", "mmd")
FAKE_CLIPS = ("first", "protocol")
Report = Callable[[str], object]


@dataclass(frozen=True)
class Estimate:
    """A distance of two sets of clips with its 95 % interval, and the number of clips on both sides.

    `low` and `high` are None where all clips of a side are in one group, which cannot be resampled.
    """

    value: float
    low: float | None
    high: float | None
    num_real: int
    num_fake: int


@dataclass(frozen=True)
class VideoDistance:
    """A distance of FAKE clips to REAL ones, with everything needed to reproduce it; `asdict` gives JSON types.

    Attributes:
        value, low, high: the distance and its 95 % bootstrap interval, as in `Estimate`.
        distance: "frechet", the squared Fréchet distance, or "mmd", the unbiased squared MMD (`vidgen.metrics.mmd`).
        detector, protocol: their names.
        num_real, num_fake: clips that were read.
        real_vs_real: the distance of real clips to those of other videos, the noise level. If there are fewer than
            twice that many clips, it is that of two halves; None if they are too few.
        infinity: the Fréchet distance extrapolated to infinitely many clips; None for MMD, or with too few clips.
        unreadable: for "real" and "fake" the (path, reason) of the videos without a clip: unreadable or too short.
        notes: reasons why the number is not comparable with others under this protocol; empty if it is.
        detector_details, protocol_details: their descriptions.
        settings: the data by name and hash, and how FAKE clips are cut.
        versions: `vidgen.common.environment.environment`.
    """

    value: float
    low: float | None
    high: float | None
    distance: str
    detector: str
    protocol: str
    num_real: int
    num_fake: int
    real_vs_real: Estimate | None
    infinity: float | None
    unreadable: dict[str, list[tuple[str, str]]]
    notes: list[str]
    detector_details: dict[str, Any]
    protocol_details: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]


@dataclass(frozen=True)
class _Side:
    """The clips of one side: windows of its videos, those of other videos, and the unusable videos.

    `is_shuffled` is true if FAKE clips are not in the order of their videos.
    """

    windows: list[Window]
    others: list[Window]
    unusable: list[tuple[str, str]]
    content: str
    is_shuffled: bool = False

    @property
    def listed(self) -> int:
        return len(self.windows) + len(self.unusable)


@torch.no_grad()
def compare_videos(
    real: str | os.PathLike,
    fake: str | os.PathLike,
    protocol: Protocol,
    detectors: Sequence[Detector],
    accelerator: Accelerator,
    *,
    folder: str | os.PathLike,
    distances: Sequence[str] = ("frechet",),
    num_real: int | None = None,
    num_fake: int | None = None,
    fake_clips: str | None = None,
    split_files: str | os.PathLike | None = None,
    batch_size: int = 16,
    num_workers: int = 0,
    shard_size: int = SHARD_SIZE,
    report: Report | None = None,
) -> list[VideoDistance] | None:
    """Measure the distances of FAKE videos to REAL ones under a protocol; all processes call it.

    Args:
        real, fake: as `list_any_videos` takes them.
        detectors: at least one, on the process's device; all see the same clips.
        folder: keeps features by the content of the files; shared by all processes and comparisons.
        distances: of `DISTANCES`.
        num_real, num_fake: number of clips; by default the protocol's or, where there are fewer FAKE clips, their
            number on both sides. Of more clips they are drawn with a fixed seed, and a larger set begins with the
            smaller one.
        fake_clips: "first" takes the first frames of every FAKE video, one after the other at its frame rate;
            "protocol" cuts FAKE videos as REAL ones. By default "protocol" only if the protocol sets no number of
            generated clips.
        split_files: folder of UCF-101's split files: REAL clips are then those of the protocol's split.
        batch_size: clips read at a time; changes results by rounding.
        num_workers: reading processes of each process.
        shard_size: clips whose features are kept together.
        report: called with lines about the videos that are found.

    Returns:
        A result for each detector and distance on the main process, None on the others.

    Raises:
        UserError: if a side cannot be read or has fewer than 4 clips, or an argument is invalid.
    """
    versions = environment()  # before files are written, which would count as modifications of the checkout
    fake_clips = fake_clips or ("protocol" if protocol.generated is None else "first")
    _check_arguments(distances, fake_clips, detectors, num_real, num_fake, batch_size, shard_size, num_workers)

    # List the videos, and choose the clips on the main process.
    if split_files is None:
        real_files = list_any_videos(real, protocol, report)
    else:
        real_files, _ = protocol_videos(real, protocol, split_files)
    fake_files = list_any_videos(fake, protocol, report)
    sides = [None, None]
    if accelerator.is_main_process:
        fake_side = _choose_fake(fake_files, protocol, fake_clips)
        count = fake_side.listed if protocol.generated is None else min(fake_side.listed, protocol.generated)
        count = count if num_fake is None else num_fake
        if fake_clips == "first" and count < len(fake_side.windows):
            fake_side = replace(fake_side, windows=_shuffle(fake_side.windows), is_shuffled=True)
        if num_real is None:
            num_real = protocol.real if count == protocol.generated or protocol.real is None else count
        drawn = draw_windows(real_files, protocol, num_real)
        sides = [_Side(drawn.windows, drawn.others, drawn.unusable, content_hash(real_files)), fake_side]
        num_fake = count
    real_side, fake_side, num_fake = broadcast_object_list([*sides, num_fake])
    fake_windows = fake_side.windows[:num_fake]
    if min(len(fake_windows), len(real_side.windows)) < 4:
        reason = next((f" ({': '.join(entry)})" for side in (fake_side, real_side) for entry in side.unusable), "")
        raise UserError(
            f"a distance needs 4 clips or more on both sides: {real} has {len(real_side.windows)} and {fake} "
            f"{len(fake_windows)}{reason}."
        )

    # Compute the features of every set.
    def read(files: Sequence[VideoFile], windows: Sequence[Window]) -> Clips:
        return partial(RealClips(files, windows, protocol).batches, num_workers=num_workers)

    collector = Collector(detectors, protocol, accelerator, Path(folder), batch_size, shard_size)
    real_source = {"content": real_side.content}
    fake_source = {"content": fake_side.content, "fake_clips": fake_clips}
    if fake_side.is_shuffled:
        fake_source["order"] = "shuffled"
    count = len(real_side.windows)
    sets = {
        "real": collector.collect("real", read(real_files, real_side.windows), count, real_source, keep=True),
        "fake": collector.collect("fake", read(fake_files, fake_windows), len(fake_windows), fake_source),
    }
    if len(real_side.others) == count:
        # The other videos depend on the size of the real set, so a larger set does not begin with the smaller one.
        others = {**real_source, "real_clips": count}
        clips = read(real_files, real_side.others)
        sets["real_vs_real"] = collector.collect("real_others", clips, count, others, keep=True)
    if not accelerator.is_main_process:
        return None

    # Measure the distances.
    settings = {
        "real": str(real),
        "fake": str(fake),
        "real_content": real_side.content,
        "fake_content": fake_side.content,
        "fake_clips": fake_clips,
        "batch_size": batch_size,
        "processes": accelerator.num_processes,
    }
    unreadable = {
        "real": sorted({*real_side.unusable, *sets["real"].unreadable}),
        "fake": sorted({*fake_side.unusable, *sets["fake"].unreadable}),
    }
    unused = len(fake_side.windows) - len(fake_windows)
    shared_notes = _list_notes(protocol, unreadable, fake_windows, fake_clips, split_files, unused)
    results = []
    for index, detector in enumerate(detectors):
        for distance in distances:
            a, b = sets["fake"].statistics[index], sets["real"].statistics[index]
            estimate = estimate_distance(distance, a, b, sets["fake"].samples, sets["real"].samples)
            notes = _list_count_notes(protocol, sets, distance) + shared_notes
            notes += list_protocol_caveats(protocol, detector)
            notes += list_rank_caveats(detector, min(a.count, b.count)) if distance == "frechet" else []
            results.append(
                VideoDistance(
                    value=estimate.value,
                    low=estimate.low,
                    high=estimate.high,
                    distance=distance,
                    detector=detector.name,
                    protocol=protocol.name,
                    num_real=estimate.num_real,
                    num_fake=estimate.num_fake,
                    real_vs_real=estimate_distance(distance, *split_real(sets, index)),
                    infinity=extrapolate(a, b) if distance == "frechet" else None,
                    unreadable=unreadable,
                    notes=notes,
                    detector_details=detector.describe(),
                    protocol_details=protocol.describe(),
                    settings=settings,
                    versions=versions,
                )
            )
    return results


def estimate_distance(
    distance: str, a: FeatureStatistics, b: FeatureStatistics, num_a: int, num_real: int
) -> Estimate | None:
    """Estimate a distance of `DISTANCES` with its interval; None where a side has fewer than 2 feature vectors."""
    if distance == "frechet":
        measured = measure_distance(a, b, num_a, num_real)
        return measured and Estimate(measured.value, *(measured.interval or (None, None)), num_real, num_a)
    if min(num_a, num_real) < 2:
        return None
    can_resample = min(len(a.filled), len(b.filled)) > 1
    return Estimate(mmd(a, b), *(mmd_interval(a, b) if can_resample else (None, None)), num_real, num_a)


def list_any_videos(root: str | os.PathLike, protocol: Protocol, report: Report | None = None) -> list[VideoFile]:
    """List the videos of a folder, a CSV or shards (`list_videos`), or those in .npy and .npz files.

    `root` is one such file, or a folder that holds such files and no video. Arrays have the protocol's frame rate.
    Raises the errors of `list_videos` and `list_array_videos`.
    """
    arrays = find_arrays(root)
    if arrays is None or (Path(root).is_dir() and find_videos(Path(root))):
        return list_videos(root, report)[0]
    return list_array_videos(arrays, protocol.fps or 1.0, report)


def _choose_fake(files: Sequence[VideoFile], protocol: Protocol, fake_clips: str) -> _Side:
    if fake_clips == "first":
        windows, unusable = first_windows(files, protocol, "listing fake clips")
    else:
        drawn = draw_windows(files, protocol, protocol.generated, description="listing fake clips")
        windows, unusable = drawn.windows, drawn.unusable
    return _Side(windows, [], unusable, content_hash(files))


def _shuffle(windows: Sequence[Window], seed: int = 0) -> list[Window]:
    return [windows[i] for i in np.random.default_rng(seed).permutation(len(windows))]


def _check_arguments(
    distances: Sequence[str],
    fake_clips: str,
    detectors: Sequence[Detector],
    num_real: int | None,
    num_fake: int | None,
    batch_size: int,
    shard_size: int,
    num_workers: int,
) -> None:
    refuse_duplicates([detector.name for detector in detectors])
    for name, values, choices in (("distances", distances, DISTANCES), ("fake_clips", [fake_clips], FAKE_CLIPS)):
        for value in values:
            if value not in choices:
                raise UserError(f"{name} must be of {', '.join(choices)}, not {value!r}.")
    for name, value, minimum in (
        ("num_real", num_real, 4),
        ("num_fake", num_fake, 4),
        ("batch_size", batch_size, 1),
        ("shard_size", shard_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value is not None and value < minimum:
            raise UserError(f"{name} must be {minimum} or more, not {value}.")


def _list_count_notes(protocol: Protocol, sets: dict[str, FeatureSet], distance: str) -> list[str]:
    """List the numbers of clips that differ from the protocol's, or between the sides of a Fréchet distance."""
    is_biased = distance == "frechet"
    reason = ": Fréchet distances depend on the number" if is_biased else ""
    notes = []
    for name, expected in (("fake", protocol.generated), ("real", protocol.real)):
        count = sets[name].samples
        if expected is not None and count != expected:
            notes.append(f"{count} {name} clips, not the protocol's {expected}{reason}.")
    num_fake, num_real = sets["fake"].samples, sets["real"].samples
    if is_biased and num_fake != num_real:
        notes.append(
            f"{num_fake} fake and {num_real} real clips: the Fréchet distance of real vs. real is that of another "
            "number of clips."
        )
    return notes


def _list_notes(
    protocol: Protocol,
    unreadable: dict[str, list[tuple[str, str]]],
    fake_windows: Sequence[Window],
    fake_clips: str,
    split_files: str | os.PathLike | None,
    unused: int,
) -> list[str]:
    """List the other reasons, of all detectors, why a number is not comparable with others under the protocol."""
    notes = []
    if unused:
        total = len(fake_windows) + unused
        notes.append(f"{len(fake_windows)} of {total} fake clips are used, drawn at random with a fixed seed.")
    for name, entries in unreadable.items():
        if entries:
            path, reason = entries[0]
            notes.append(f"{len(entries)} {name} videos are left out, the first {path}: {reason}.")
    if protocol.split != "all" and split_files is None:
        notes.append(f"All videos of REAL count, not only the protocol's split, {protocol.split} (see --split-files).")
    rates = sorted({round(window.fps, 2) for window in fake_windows})
    if fake_clips == "first" and protocol.fps is not None and rates != [round(protocol.fps, 2)]:
        stated = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
        notes.append(
            f"FAKE videos have {stated} fps and the protocol {protocol.fps:g}: their frames are taken as they are, so "
            "their motion is compared at another speed."
        )
    return notes
