"""The real clips of a protocol: which windows of which videos they are, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..common.errors import UserError
from ..common.progress import progress
from ..data.listing import list_videos
from ..data.transforms import frames_to_clip
from ..data.types import VideoFile
from ..data.ucf101 import ucf101_split
from ..data.video import VideoError, probe, read_clip
from .protocols import Protocol, protocol_clips


class Window(NamedTuple):
    """The place of a clip.

    Attributes:
        video: index of the video.
        start: first frame, in seconds.
        fps: frames per second.
        num_frames: number of frames.
    """

    video: int
    start: float
    fps: float
    num_frames: int


@dataclass(frozen=True)
class RealSet:
    """The real clips of a protocol.

    Attributes:
        windows: the set, in a fixed random order.
        others: at most the same number of windows of videos outside the set, to compare real clips with real ones.
        unusable: (path, reason) of the videos that are unreadable or too short.
    """

    windows: list[Window]
    others: list[Window]
    unusable: list[tuple[str, str]]


def protocol_videos(
    root: str | os.PathLike, protocol: Protocol, split_files: str | os.PathLike | None = None
) -> tuple[list[VideoFile], list[str]]:
    """Return the videos of the protocol's split (UCF-101's first official one), and the names of the classes.

    Raises the errors of `ucf101_split`, or of `list_videos` for a protocol without a split.
    """
    if protocol.split == "all":
        return list_videos(root)
    train, test, classes = ucf101_split(root, 1, split_files)
    return {"train": train, "test": test, "train+test": [*train, *test]}[protocol.split], classes


def draw_windows(
    files: Sequence[VideoFile],
    protocol: Protocol,
    count: int | None,
    seed: int = 0,
    description: str = "listing real clips",
) -> RealSet:
    """Draw the `count` clips (None: all) of a protocol's real set; the same for the same seed.

    Opens every video, for milliseconds. A larger set begins with the smaller one.

    Raises:
        UserError: if no video has a clip.
    """
    videos, unusable = [], []
    for number, file in enumerate(progress(files, description)):
        try:
            videos.append(_Video.open(number, file, protocol))
        except VideoError as error:
            unusable.append((str(file.path), error.reason))
    if not videos:
        reason = ": ".join(unusable[0]) if unusable else "there are no videos"
        raise UserError(f"no video has a clip for the protocol {protocol.name}: {reason}")
    if protocol.windows == "one":
        drawn = [np.random.default_rng([seed, video.number]).integers(len(video.starts)) for video in videos]
        videos = [replace(video, starts=video.starts[i : i + 1]) for video, i in zip(videos, drawn, strict=True)]

    # Number the windows of all videos consecutively, and create only the chosen ones: UCF-101 has 2 million.
    ends = np.cumsum([len(video.starts) for video in videos])
    order = np.random.default_rng(seed).permutation(ends[-1])
    owner = np.searchsorted(ends, order, side="right")
    chosen = slice(0, len(order) if count is None else count)
    others = np.flatnonzero(~np.isin(owner, owner[chosen]))[: len(order[chosen])]

    def windows_at(places: slice | np.ndarray) -> list[Window]:
        pairs = zip(owner[places].tolist(), order[places].tolist(), strict=True)
        return [videos[i].window(place - int(ends[i])) for i, place in pairs]

    return RealSet(windows_at(chosen), windows_at(others), unusable)


def first_windows(
    files: Sequence[VideoFile], protocol: Protocol, description: str = "listing clips"
) -> tuple[list[Window], list[tuple[str, str]]]:
    """Return the window of the first frames of every video, one after the other at its frame rate, in their order.

    These are the clips of generated videos. Opens every video, for milliseconds.

    Returns:
        The windows, and (path, reason) of the videos that are unreadable or too short.
    """
    consecutive = replace(protocol, fps=None, stride=1)
    windows, unusable = [], []
    for number, file in enumerate(progress(files, description)):
        try:
            windows.append(_Video.open(number, file, consecutive).window(0))
        except VideoError as error:
            unusable.append((str(file.path), error.reason))
    return windows, unusable


@dataclass(frozen=True)
class _Video:
    """The windows of a video with `frames` frames at `rate` fps: `length` frames, `step` apart, from `starts`."""

    number: int
    rate: float
    frames: int
    step: int
    length: int
    starts: range

    @classmethod
    def open(cls, number: int, file: VideoFile, protocol: Protocol) -> _Video:
        info = probe(file.path)
        if protocol.fps is None:
            rate, frames, step = info.fps, info.num_frames, protocol.stride
        else:
            rate, frames, step = protocol.fps, int(info.duration * protocol.fps + 1e-6), 1
        starts = protocol.starts(frames)
        if not len(starts):
            raise VideoError(f"too short: {protocol.frames} frames {step} apart do not fit into {frames}", file.path)
        return cls(number, rate, frames, step, protocol.frames, starts)

    def window(self, place: int) -> Window:
        first = self.starts[place]
        available = 1 + (self.frames - 1 - first) // self.step  # too few where the protocol repeats the last frame
        return Window(self.number, first / self.rate, self.rate / self.step, min(available, self.length))


@dataclass(frozen=True)
class ClipBatch:
    """Clips of a set, without those that cannot be read.

    Attributes:
        numbers: of the B clips in their set.
        keys: the resampling unit of each clip: the video of a real clip, the number of a generated one.
        clips: float (B, 3, T, H, W) in [-1, 1].
        unreadable: (path, reason) of the missing clips.
    """

    numbers: list[int]
    keys: list[int]
    clips: torch.Tensor
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def read_window(files: Sequence[VideoFile], window: Window, protocol: Protocol) -> torch.Tensor:
    """Read the clip in a window as the protocol prepares it: (3, frames, size, size) in [-1, 1].

    Raises:
        VideoError: if it cannot be decoded.
    """
    path = files[window.video].path
    frames = read_clip(path, start=window.start, fps=window.fps, num_frames=window.num_frames)
    return protocol_clips(frames_to_clip(frames)[None], protocol)[0]


class RealClips(Dataset):
    """Windows of videos as clips (3, frames, size, size) in [-1, 1], prepared by a protocol.

    An item is the index, the number of the video, and the clip, or its (path, reason) if it cannot be read.
    """

    def __init__(self, files: Sequence[VideoFile], windows: Sequence[Window], protocol: Protocol) -> None:
        self.files, self.windows, self.protocol = files, windows, protocol

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[int, int, torch.Tensor | tuple[str, str]]:
        window = self.windows[index]
        try:
            return index, window.video, read_window(self.files, window, self.protocol)
        except VideoError as error:
            return index, window.video, (str(self.files[window.video].path), error.reason)

    def batches(self, indices: Sequence[Sequence[int]], num_workers: int = 0) -> Iterator[ClipBatch]:
        """Read batches of clips by their indices."""
        loader = DataLoader(
            self,
            batch_sampler=indices,
            num_workers=num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # the default would draw from the global generator
        )
        return iter(loader)


def _collate(items: Sequence[tuple[int, int, torch.Tensor | tuple[str, str]]]) -> ClipBatch:
    readable = [item for item in items if isinstance(item[2], torch.Tensor)]
    clips = torch.stack([clip for *_, clip in readable]) if readable else torch.zeros(0, 3, 1, 1, 1)
    unreadable = [reason for *_, reason in items if isinstance(reason, tuple)]
    return ClipBatch([index for index, *_ in readable], [video for _, video, _ in readable], clips, unreadable)
