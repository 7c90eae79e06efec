"""The real clips that a protocol compares with: which windows of which videos, and reading them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.dataset import VideoFile, frames_to_clip, list_videos
from ..data.ucf101 import ucf101_split
from ..data.video import VideoError, probe, read_clip
from ..errors import UserError
from ..progress import progress
from .protocols import Protocol, protocol_clips


class Window(NamedTuple):
    """A clip's place: its video's number, the second it starts at, its frames a second, and how many there are."""

    video: int
    start: float
    fps: float
    num_frames: int


@dataclass(frozen=True)
class RealSet:
    """A protocol's real clips.

    Attributes:
        windows: of the set, in a fixed random order.
        others: of videos that are not in the set, at most as many: for real against real.
        unusable: (path, reason) of the videos that are unreadable or too short.
    """

    windows: list[Window]
    others: list[Window]
    unusable: list[tuple[str, str]]


def protocol_videos(
    root: str | os.PathLike, protocol: Protocol, split_files: str | os.PathLike | None = None
) -> tuple[list[VideoFile], list[str]]:
    """The videos of the protocol's split (UCF-101's first official one), and the names of the classes.

    Raises what `ucf101_split` raises, or for a protocol without a split `list_videos`.
    """
    if protocol.split == "all":
        return list_videos(root)
    train, test, classes = ucf101_split(root, 1, split_files)
    return {"train": train, "test": test, "train+test": [*train, *test]}[protocol.split], classes


def draw_windows(files: Sequence[VideoFile], protocol: Protocol, count: int | None, seed: int = 0) -> RealSet:
    """Which `count` clips (None: all there are) are a protocol's real set; the same for the same seed.

    Opens every video, for milliseconds. A larger set begins with the smaller one.

    Raises:
        UserError: if no video has a clip.
    """
    places: list[list[Window]] = []
    unusable = []
    for number, file in enumerate(progress(files, "looking for real clips")):
        try:
            windows = list(_windows(number, file, protocol))
        except VideoError as error:
            unusable.append((str(file.path), error.reason))
            continue
        if not windows:
            unusable.append((str(file.path), f"too short for {protocol.frames} frames"))
        elif protocol.windows == "one":
            windows = [windows[np.random.default_rng([seed, number]).integers(len(windows))]]
        places.append(windows)
    everything = [window for windows in places for window in windows]
    if not everything:
        reason = ": ".join(unusable[0]) if unusable else "there are no videos"
        raise UserError(f"no video has a clip for the protocol {protocol.name}: {reason}")
    order = np.random.default_rng(seed).permutation(len(everything))
    chosen = [everything[place] for place in order[:count]]
    taken = {window.video for window in chosen}
    others = (everything[place] for place in order[len(chosen) :])
    others = [window for window in others if window.video not in taken][: len(chosen)]
    return RealSet(chosen, others, unusable)


def _windows(number: int, file: VideoFile, protocol: Protocol) -> Iterator[Window]:
    info = probe(file.path)
    if protocol.fps is None:
        rate, frames, step = info.fps, info.num_frames, protocol.stride
    else:
        rate, frames, step = protocol.fps, int(info.duration * protocol.fps + 1e-6), 1
    for first in protocol.starts(frames):
        there = 1 + (frames - 1 - first) // step  # fewer than the protocol's where it repeats the last
        yield Window(number, first / rate, rate / step, min(there, protocol.frames))


class RealClips(Dataset):
    """Windows of videos as clips (3, frames, size, size) in [-1, 1], the way a protocol cuts them.

    An item is a dict: `video`, or None where it cannot be read; `key`, the number of its video; `skipped`, a list of
    (path, reason).
    """

    def __init__(self, files: Sequence[VideoFile], windows: Sequence[Window], protocol: Protocol) -> None:
        self.files, self.windows, self.protocol = files, windows, protocol

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict:
        window = self.windows[index]
        path = self.files[window.video].path
        try:
            frames = read_clip(path, start=window.start, fps=window.fps, num_frames=window.num_frames)
        except VideoError as error:
            return {"video": None, "key": window.video, "skipped": [(str(path), error.reason)]}
        clip = protocol_clips(frames_to_clip(frames)[None], self.protocol)[0]
        return {"video": clip, "key": window.video, "skipped": []}

    def batches(
        self, indices: Sequence[Sequence[int]], num_workers: int = 0
    ) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(keys, clips (B, 3, T, H, W)) of batches of indices; clips that cannot be read are left out."""
        return iter(
            DataLoader(
                self,
                batch_sampler=indices,
                num_workers=num_workers,
                collate_fn=_collate,
                generator=torch.Generator(),  # its own: reading draws nothing from the global one
            )
        )


def _collate(items: Sequence[dict]) -> tuple[list[int], torch.Tensor]:
    there = [item for item in items if item["video"] is not None]
    clips = torch.stack([item["video"] for item in there]) if there else torch.zeros(0, 3, 1, 1, 1)
    return [item["key"] for item in there], clips
