"""The real clips that a protocol compares with: which windows of which videos, and reading them."""

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
    videos, unusable = [], []
    for number, file in enumerate(progress(files, "looking for real clips")):
        try:
            videos.append(_Video.of(number, file, protocol))
        except VideoError as error:
            unusable.append((str(file.path), error.reason))
    if not videos:
        reason = ": ".join(unusable[0]) if unusable else "there are no videos"
        raise UserError(f"no video has a clip for the protocol {protocol.name}: {reason}")
    if protocol.windows == "one":
        drawn = [np.random.default_rng([seed, video.number]).integers(len(video.starts)) for video in videos]
        videos = [replace(video, starts=video.starts[i : i + 1]) for video, i in zip(videos, drawn, strict=True)]

    # All windows of all videos in a row, of which only the chosen ones are ever written down: UCF-101 has 2 million.
    ends = np.cumsum([len(video.starts) for video in videos])
    order = np.random.default_rng(seed).permutation(ends[-1])
    owner = np.searchsorted(ends, order, side="right")
    chosen = slice(0, len(order) if count is None else count)
    others = np.flatnonzero(~np.isin(owner, owner[chosen]))[: len(order[chosen])]

    def windows(places: slice | np.ndarray) -> list[Window]:
        pairs = zip(owner[places].tolist(), order[places].tolist(), strict=True)
        return [videos[i].window(place - int(ends[i])) for i, place in pairs]

    return RealSet(windows(chosen), windows(others), unusable)


@dataclass(frozen=True)
class _Video:
    """The windows of one video: frames `step` apart from any of `starts`, of `frames` at `rate` a second."""

    number: int
    rate: float
    frames: int
    step: int
    length: int
    starts: range

    @classmethod
    def of(cls, number: int, file: VideoFile, protocol: Protocol) -> _Video:
        info = probe(file.path)
        if protocol.fps is None:
            rate, frames, step = info.fps, info.num_frames, protocol.stride
        else:
            rate, frames, step = protocol.fps, int(info.duration * protocol.fps + 1e-6), 1
        starts = protocol.starts(frames)
        if not len(starts):
            raise VideoError(f"too short: {protocol.frames} frames are wanted, {step} apart of {frames}", file.path)
        return cls(number, rate, frames, step, protocol.frames, starts)

    def window(self, place: int) -> Window:
        first = self.starts[place]
        there = 1 + (self.frames - 1 - first) // self.step  # too few where the protocol repeats the last
        return Window(self.number, first / self.rate, self.rate / self.step, min(there, self.length))


@dataclass(frozen=True)
class ClipBatch:
    """Clips of a set by their numbers, without those that could not be had.

    Attributes:
        numbers: of the B clips, in their set.
        keys: what each belongs to where samples are drawn anew: a real clip's video, a generated one's own number.
        clips: float (B, 3, T, H, W) in [-1, 1].
        unreadable: (path, reason) of clips that are missing.
    """

    numbers: list[int]
    keys: list[int]
    clips: torch.Tensor
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def read_window(files: Sequence[VideoFile], window: Window, protocol: Protocol) -> torch.Tensor:
    """The clip (3, frames, size, size) in [-1, 1] in a window, as the protocol has it. Raises `VideoError`."""
    path = files[window.video].path
    frames = read_clip(path, start=window.start, fps=window.fps, num_frames=window.num_frames)
    return protocol_clips(frames_to_clip(frames)[None], protocol)[0]


class RealClips(Dataset):
    """Windows of videos as clips (3, frames, size, size) in [-1, 1], the way a protocol cuts them.

    An item is the index, the number of its video, and the clip; or, if it cannot be read, its (path, reason).
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
        """The clips of batches of indices."""
        loader = DataLoader(
            self,
            batch_sampler=indices,
            num_workers=num_workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # its own: reading draws nothing from the global one
        )
        return iter(loader)


def _collate(items: Sequence[tuple[int, int, torch.Tensor | tuple[str, str]]]) -> ClipBatch:
    there = [item for item in items if isinstance(item[2], torch.Tensor)]
    clips = torch.stack([clip for *_, clip in there]) if there else torch.zeros(0, 3, 1, 1, 1)
    unreadable = [said for *_, said in items if isinstance(said, tuple)]
    return ClipBatch([index for index, *_ in there], [video for _, video, _ in there], clips, unreadable)
