"""Datasets of clips cut from videos.

All randomness is a function of (seed, epoch, index). A video that cannot give a clip is replaced by the next one that
can; its path and the reason are returned with the sample.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch.utils.data import Dataset

from ..common.errors import UserError
from ..common.io import atomic_write
from .decoders import ClipReader
from .listing import list_videos
from .transforms import crop, frames_to_clip, jitter_color, resize_to_cover, swap_background
from .types import VideoFile, VideoSource
from .video import VideoError, probe


class ClipDataset(Dataset):
    """Clips of equal size, length and rate from the videos of a dataset.

    Items are selected by index, or by (epoch, index), which draws the clip again for each epoch. A sample is a dict:

    - `video`: float32 (3, T, H, W) in [-1, 1]; `label`: -1 where there is none; `index`: the requested one;
    - `path` of the video that was read, and `start` in it, in seconds;
    - `skipped`: (path, reason) of the videos before it that are unreadable or too short, in a list;
    - `fallbacks`: (path, reason) of the video if PyAV read it although another decoder was chosen, in a list.

    Args:
        root: a root as in `list_videos`, or a list of `VideoFile` (with their `classes`, if there are any).
        num_frames, fps: a clip's length and rate; frames are chosen by their timestamps.
        resolution: side of the square clip in pixels, or (height, width). Frames are resized to cover it, with
            antialiasing, and the rest cropped.
        train: random start, random crop and the augmentations below, drawn from (seed, epoch, index); otherwise clips
            are cut from the middle of the video, in time and space.
        flip: flip every other clip horizontally.
        zoom: enlarge frames by a factor from 1 to this before the crop.
        speed: play clips at 1 / this to this times their speed; a short video limits how fast.
        color: change contrast, color balance and brightness by up to this, as in `jitter_color`.
        background_swap: put this fraction of clips before the backgrounds of other videos, as in `swap_background`.
        motion_classes: of classes that are motions, the only ones of which backgrounds are swapped; empty: all clips.
        clips_per_video: how often each video is visited; without `train`, at evenly spaced starts.
        decoder: one of `vidgen.data.decoders.DECODERS`.

    Raises:
        UserError: the errors of `list_videos` and `ClipReader`, or an unknown class in `motion_classes`.
        VideoError: if no video is readable.
    """

    def __init__(
        self,
        root: str | os.PathLike | Sequence[VideoFile],
        num_frames: int,
        fps: float,
        resolution: int | Sequence[int],
        *,
        train: bool = True,
        flip: bool = False,
        zoom: float = 1.0,
        speed: float = 1.0,
        color: float = 0.0,
        background_swap: float = 0.0,
        motion_classes: Sequence[str] = (),
        seed: int = 0,
        clips_per_video: int = 1,
        classes: Sequence[str] = (),
        decoder: str = "pyav",
    ):
        self.reader = ClipReader(decoder)
        if isinstance(root, str | os.PathLike):
            self.files, self.classes = list_videos(root)
            self.where = f"under {root}"
        else:
            self.files, self.classes = list(root), list(classes)
            self.where = f"among the {len(self.files)} listed"
        self.num_frames, self.fps = num_frames, fps
        self.size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        self.train, self.seed = train, seed
        self.flip, self.zoom, self.speed, self.color = flip, zoom, speed, color
        self.background_swap = background_swap
        self._motions = find_classes(motion_classes, self.classes)
        self.clips_per_video = clips_per_video
        self._bad: dict[int, str] = {}  # number of a video -> reason; each process has a separate one
        if not any(self._probe(number) for number in range(len(self.files))):
            raise self._no_readable_video(self.check())

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.classes))

    def centered(self) -> ClipDataset:
        """The same videos, one clip from the middle of each."""
        fixed = dict(train=False, classes=self.classes, decoder=self.reader.decoder)
        return ClipDataset(self.files, self.num_frames, self.fps, self.size, **fixed)

    def check(self) -> list[tuple[str, str]]:
        """Open every video, in milliseconds each, and list (path, reason) of those that cannot give a clip."""
        bad = [number for number in range(len(self.files)) if not self._probe(number)]
        return [(str(self.files[number].path), self._bad[number]) for number in bad]

    def __len__(self) -> int:
        return len(self.files) * self.clips_per_video

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} clips")
        visit, first = divmod(index, len(self.files))
        skipped = []
        for step in range(len(self.files)):
            number = (first + step) % len(self.files)
            if self._probe(number):
                try:
                    return {**self._read(number, visit, epoch, index), "skipped": skipped}
                except VideoError as error:  # not cached: another clip of the same video may be intact
                    reason = error.reason
            else:
                reason = self._bad[number]
            skipped.append((str(self.files[number].path), reason))
        raise self._no_readable_video(skipped)

    def _probe(self, number: int) -> bool:
        if number not in self._bad:
            try:
                probe(self.files[number].path).latest_start(fps=self.fps, num_frames=self.num_frames)
            except VideoError as error:
                self._bad[number] = error.reason
        return number not in self._bad

    def _no_readable_video(self, skipped: list[tuple[str, str]]) -> VideoError:
        first = ": ".join(skipped[0]) if skipped else "it is empty"
        return VideoError(f"no readable video {self.where}: {first}")

    def _read(self, number: int, visit: int, epoch: int, index: int) -> dict:
        path, label = self.files[number]
        rng = np.random.default_rng([self.seed, epoch, index])
        if self.train:
            time, down, across = rng.random(3)  # each from 0, the first possible place, to 1, the last
        else:
            time, down, across = (visit + 0.5) / self.clips_per_video, 0.5, 0.5
        zoom = speed = 1.0
        if self.train and self.zoom > 1:
            zoom = rng.uniform(1, self.zoom)
        if self.train and self.speed > 1:
            speed = min(self.speed ** rng.uniform(-1, 1), self._fastest(path))
        video, start, fallback = self._cut(path, time, down, across, zoom, speed)
        if self.train and self.flip and rng.random() < 0.5:
            video = video.flip(-1)
        if self.train and self.background_swap > 0 and (not self._motions or label in self._motions):
            video = self._swap_background(video, number, rng)
        if self.train and self.color > 0:
            video = jitter_color(video, self.color, rng.random(5))
        return {
            "video": video,
            "label": -1 if label is None else label,
            "index": index,
            "path": str(path),
            "start": start,
            "fallbacks": [] if fallback is None else [(str(path), fallback)],
        }

    def _cut(
        self, path: VideoSource, time: float, down: float, across: float, zoom: float = 1.0, speed: float = 1.0
    ) -> tuple[torch.Tensor, float, str | None]:
        """Read a clip (3, T, H, W) in [-1, 1], its start in seconds, and the reason if another decoder read it.

        `time`, `down` and `across` run from 0, the first possible place, to 1, the last.
        """
        fps = self.fps / speed
        start = time * probe(path).latest_start(fps=fps, num_frames=self.num_frames)
        frames, fallback = self.reader.read(path, start=start, fps=fps, num_frames=self.num_frames)
        # Resize bytes, which is within one gray level of resizing floats, and at least five times as fast.
        covered = tuple(round(side * zoom) for side in self.size)
        pixels = crop(resize_to_cover(rearrange(frames, "t h w c -> c t h w"), covered), self.size, down, across)
        return frames_to_clip(rearrange(pixels.contiguous(), "c t h w -> t h w c")), start, fallback

    def _swap_background(self, video: torch.Tensor, number: int, rng: np.random.Generator) -> torch.Tensor:
        """Put a fraction of the clips before the background of another video, unless that video is unreadable."""
        chosen, other, *place = rng.random(5)
        other = (number + 1 + int(other * (len(self.files) - 1))) % len(self.files)  # never the same video
        if chosen >= self.background_swap or other == number or not self._probe(other):
            return video
        try:
            before, _, _ = self._cut(self.files[other].path, *place)
        except VideoError:
            return video
        return swap_background(video, before)

    def _fastest(self, path: VideoSource) -> float:
        """The highest speed at which a video is long enough for a clip."""
        span = (self.num_frames - 1) / self.fps
        return 1 + probe(path).latest_start(fps=self.fps, num_frames=self.num_frames) / span if span else self.speed


def find_classes(names: Sequence[str], classes: Sequence[str]) -> set[int]:
    """The ids of `data.motion_classes`. Raises a `UserError` for a name that is not among the classes."""
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"data.motion_classes: {', '.join(unknown)} is not among the classes of the videos: {', '.join(classes)}."
        )
    return {classes.index(name) for name in names}


def collate_clips(samples: Sequence[dict]) -> dict:
    """Stack samples of `ClipDataset`: `video` (B, 3, T, H, W), `label`, `index` and `start` (B,), `path` a list.

    `own` (B,) is false for a clip that replaces an unreadable one; that clip also occurs under its regular index.
    `skipped` and `fallbacks` list each (path, reason) once, in order of occurrence.
    """
    return {
        "video": torch.stack([sample["video"] for sample in samples]),
        **{name: torch.tensor([sample[name] for sample in samples]) for name in ("label", "index", "start")},
        "path": [sample["path"] for sample in samples],
        "own": torch.tensor([not sample["skipped"] for sample in samples]),
        "skipped": list(dict.fromkeys(entry for sample in samples for entry in sample["skipped"])),
        "fallbacks": list(dict.fromkeys(entry for sample in samples for entry in sample.get("fallbacks", ()))),
    }


class BadVideos:
    """The skipped videos with the reasons, each once, in a JSONL file that resumed runs extend."""

    def __init__(self, file: str | os.PathLike):
        self.file = Path(file)
        self.reasons: dict[str, str] = {}
        if self.file.exists():
            entries = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
            self.reasons = {entry["path"]: entry["reason"] for entry in entries}

    @property
    def count(self) -> int:
        return len(self.reasons)

    def add(self, skipped: Iterable[tuple[str, str]]) -> int:
        """Record `skipped` of samples or batches; returns how many are new."""
        new = {path: reason for path, reason in skipped if path not in self.reasons}
        if new:
            self.reasons.update(new)
            lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in self.reasons.items()]
            with atomic_write(self.file) as unfinished:
                unfinished.write_text("".join(lines), encoding="utf-8")
        return len(new)
