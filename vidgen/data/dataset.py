"""From listed videos to batches of clips.

Nothing here is random but by (seed, epoch, index), and nothing is silently invented: a video that cannot give a clip
is stood in for by the next one that can, and its name and the reason travel with the sample to the main process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.data import Dataset

from ..common.images import to_uint8
from ..common.io import atomic_write
from .decoders import ClipReader
from .listing import find_videos, list_train_and_validation, list_training_videos, list_videos, split_validation
from .types import VideoFile
from .video import VideoError, probe

__all__ = [
    "BadVideos",
    "ClipDataset",
    "VideoFile",
    "clip_to_frames",
    "collate_clips",
    "crop",
    "find_videos",
    "frames_to_clip",
    "list_train_and_validation",
    "list_training_videos",
    "list_videos",
    "resize_to_cover",
    "split_validation",
]

# --- frames and clips -----------------------------------------------------------------------------------------------


def frames_to_clip(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (..., T, H, W, 3) in [0, 255] to float32 (..., 3, T, H, W) in [-1, 1]."""
    return rearrange(frames.to(torch.float32, copy=True).div_(127.5).sub_(1), "... t h w c -> ... c t h w")


def clip_to_frames(clip: torch.Tensor) -> torch.Tensor:
    """Float (..., 3, T, H, W) in [-1, 1] to uint8 (..., T, H, W, 3) on the CPU, rounded and clamped.

    Raises `ValueError` if the clip is not finite: NaN would become black.
    """
    return rearrange(to_uint8(clip), "... c t h w -> ... t h w c").cpu()


def resize_to_cover(clip: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (C, T, H, W), float or uint8, keeping its proportions, until it just covers `size` (height, width).

    With antialiasing.
    """
    scale = max(wanted / given for wanted, given in zip(size, clip.shape[-2:], strict=True))
    covering = [max(wanted, round(given * scale)) for wanted, given in zip(size, clip.shape[-2:], strict=True)]
    if covering == list(clip.shape[-2:]):
        return clip
    frames = rearrange(clip, "c t h w -> t c h w")
    frames = F.interpolate(frames, size=covering, mode="bilinear", antialias=True, align_corners=False)
    return rearrange(frames, "t c h w -> c t h w")


def crop(clip: torch.Tensor, size: tuple[int, int], down: float, across: float) -> torch.Tensor:
    """Cut `size` (height, width) out of (C, T, H, W); `down` and `across` run from 0 (top, left) to 1."""
    (height, width), (full_height, full_width) = size, clip.shape[-2:]
    top, left = round(down * (full_height - height)), round(across * (full_width - width))
    return clip[..., top : top + height, left : left + width]


# --- the dataset ----------------------------------------------------------------------------------------------------


class ClipDataset(Dataset):
    """Clips of equal size, length and rate from the videos of a dataset.

    Args:
        root: what `list_videos` takes, or a list of `VideoFile` (then give `classes` too, if there are any).
        num_frames, fps: a clip's length and rate; frames are chosen by their timestamps.
        resolution: side of the square clip in pixels, or (height, width). The short side is resized to it, with
            antialiasing, and the rest cropped.
        train: random start, random crop and (with `flip`) random mirroring, drawn from (seed, epoch, index) alone;
            otherwise clips are cut from the middle of the video, in time and space.
        clips_per_video: how often each video is visited; without `train`, at evenly spaced starts.
        decoder: what decodes the videos, one of `vidgen.data.decoders.DECODERS`.

    Asked for by index, or by (epoch, index), which draws anew. A sample is a dict: `video` float32 (3, T, H, W) in
    [-1, 1]; `label` (-1 where there is none); `index`, the one asked for; `path` of the video that was read and
    `start` in it, in seconds; `skipped`, the list of (path, reason) of videos passed over because they are unreadable
    or too short: the next readable video takes their place; `fallbacks`, the (path, reason) of the video if PyAV read
    it although another decoder was chosen.
    Raises what `list_videos` and `ClipReader` raise, and `VideoError` if no video at all is readable.
    """

    def __init__(
        self,
        root: str | os.PathLike | Sequence[VideoFile],
        num_frames: int,
        fps: float,
        resolution: int | tuple[int, int],
        *,
        train: bool = True,
        flip: bool = False,
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
        self.train, self.flip, self.seed = train, flip, seed
        self.clips_per_video = clips_per_video
        self._bad: dict[int, str] = {}  # number of a video -> reason; every process finds out for itself
        if not any(self._probe(number) for number in range(len(self.files))):
            raise self._nothing_readable(self.check())

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.classes))

    def centered(self) -> ClipDataset:
        """The same videos, one clip from the middle of each."""
        return ClipDataset(
            self.files,
            self.num_frames,
            self.fps,
            self.size,
            train=False,
            classes=self.classes,
            decoder=self.reader.decoder,
        )

    def check(self) -> list[tuple[str, str]]:
        """Open every video and list (path, reason) of those that cannot give a clip; takes milliseconds for each."""
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
                except VideoError as error:  # not remembered: another clip of the same video may be sound
                    reason = error.reason
            else:
                reason = self._bad[number]
            skipped.append((str(self.files[number].path), reason))
        raise self._nothing_readable(skipped)

    def _probe(self, number: int) -> bool:
        if number not in self._bad:
            try:
                probe(self.files[number].path).latest_start(fps=self.fps, num_frames=self.num_frames)
            except VideoError as error:
                self._bad[number] = error.reason
        return number not in self._bad

    def _nothing_readable(self, skipped: list[tuple[str, str]]) -> VideoError:
        first = ": ".join(skipped[0]) if skipped else "it is empty"
        return VideoError(f"no readable video {self.where}: {first}")

    def _read(self, number: int, visit: int, epoch: int, index: int) -> dict:
        path, label = self.files[number]
        rng = np.random.default_rng([self.seed, epoch, index])
        if self.train:
            in_time, down, across = rng.random(3)  # each from 0, the first place possible, to 1, the last
        else:
            in_time, down, across = (visit + 0.5) / self.clips_per_video, 0.5, 0.5
        start = in_time * probe(path).latest_start(fps=self.fps, num_frames=self.num_frames)
        frames, fallback = self.reader.read(path, start=start, fps=self.fps, num_frames=self.num_frames)
        # Resized as bytes, which is within one gray level of resizing floats, and five times as fast or more.
        pixels = crop(resize_to_cover(rearrange(frames, "t h w c -> c t h w"), self.size), self.size, down, across)
        if self.train and self.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        return {
            "video": frames_to_clip(rearrange(pixels.contiguous(), "c t h w -> t h w c")),
            "label": -1 if label is None else label,
            "index": index,
            "path": str(path),
            "start": start,
            "fallbacks": [] if fallback is None else [(str(path), fallback)],
        }


def collate_clips(samples: Sequence[dict]) -> dict:
    """Stack samples of `ClipDataset`: `video` (B, 3, T, H, W), `label`, `index` and `start` (B,), `path` a list.

    `own` (B,) is false for a clip that stands in for an unreadable one, and will come again in its own place;
    `skipped` and `fallbacks` list each (path, reason) once, in the order met.
    """
    return {
        "video": torch.stack([sample["video"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "start": torch.tensor([sample["start"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
        "own": torch.tensor([not sample["skipped"] for sample in samples]),
        "skipped": list(dict.fromkeys(entry for sample in samples for entry in sample["skipped"])),
        "fallbacks": list(dict.fromkeys(entry for sample in samples for entry in sample.get("fallbacks", ()))),
    }


class BadVideos:
    """The videos that had to be skipped, each once and with the reason, in a JSONL file that a resumed run goes on."""

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
        """Record `skipped` as samples and batches carry it; returns how many were new."""
        new = {path: reason for path, reason in skipped if path not in self.reasons}
        if new:
            self.reasons.update(new)
            lines = [json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in self.reasons.items()]
            with atomic_write(self.file) as unfinished:
                unfinished.write_text("".join(lines), encoding="utf-8")
        return len(new)
