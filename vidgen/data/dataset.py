"""From a folder or list of videos to batches of clips.

Nothing here is random but by (seed, epoch, index), and nothing is silently invented: a video that cannot give a clip
is stood in for by the next one that can, and its name and the reason travel with the sample to the main process.
"""

from __future__ import annotations

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.data import Dataset

from ..errors import UserError
from ..files import to_uint8, written_aside
from .shards import find_shards, read_shards
from .video import VIDEO_EXTENSIONS, ShardMember, VideoError, probe, read_clip

if TYPE_CHECKING:
    from ..config import DataConfig

# --- listing files ------------------------------------------------------------------------------------------------


class VideoFile(NamedTuple):
    """A video and its class: an index into the list of classes, or None."""

    path: Path | ShardMember
    label: int | None


def list_videos(root: str | os.PathLike) -> tuple[list[VideoFile], list[str]]:
    """List the videos of a dataset, sorted by path, and the names of its classes, sorted.

    `root` is one of: a folder that directly holds videos (no classes; sub-folders are searched too); a folder of
    folders, where a video's class is the folder that directly holds it, at any depth (UCF-101 as it unpacks); a CSV
    file with the header `path,label`, where label is optional, paths are relative to the CSV and its order is kept;
    WebDataset shards, as `vidgen.data.shards.find_shards` takes them, in their order. Classes that are all whole
    numbers are sorted as numbers. Raises `UserError` where there is no such thing, or no video in it.
    """
    shards, root = find_shards(root), Path(root)
    classes: list[str] = []
    if shards is not None:
        members, classes = read_shards(shards)
        paths, names = [path for path, _ in members], [name for _, name in members]
    elif root.is_dir():
        paths = find_videos(root)
        named = any(path.parent == root for path in paths)
        names = [None if named else path.parent.name for path in paths]
    elif root.is_file() and root.suffix.lower() == ".csv":
        paths, names = _read_csv(root)
    elif root.exists():
        raise UserError(
            f"{root} is not a dataset: expected a folder of videos, shards, or a CSV file with a column 'path'"
        )
    else:
        raise UserError(f"no dataset at {root}: expected a folder of videos, shards, or a CSV file")
    if not paths:
        raise UserError(f"no video in {root}: expected files ending in {', '.join(sorted(VIDEO_EXTENSIONS))}")

    present = {name for name in names if name is not None}
    if not present <= set(classes):  # only an index of shards knows them beforehand
        classes = sorted(present, key=int) if all(name.isdecimal() for name in present) else sorted(present)
    label_of = {name: label for label, name in enumerate(classes)}
    return [VideoFile(path, label_of.get(name)) for path, name in zip(paths, names, strict=True)], classes


def find_videos(root: Path) -> list[Path]:
    """Every video below a folder, sorted; links are followed, hidden files and folders left out."""
    found, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(  # no hidden ones, and no links that lead in circles
            name for name in subfolders if name[0] != "." and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        found += [
            Path(folder, name) for name in names if name[0] != "." and Path(name).suffix.lower() in VIDEO_EXTENSIONS
        ]
    return sorted(found)


def _read_csv(table: Path) -> tuple[list[Path], list[str | None]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{table} is not a CSV file: {error}") from error
    if rows and "path" not in rows[0]:
        raise UserError(f"{table} has no column 'path': its first line should read path,label")
    rows = [row for row in rows if row["path"]]
    return [table.parent / row["path"] for row in rows], [(row.get("label") or "").strip() or None for row in rows]


def list_train_and_validation(data: DataConfig, seed: int) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    """What a recipe trains on, what it validates on, and the names of the classes.

    Validation takes the videos of `validation_root`; or `num_validation_videos` of the official test list where
    `ucf101_split` is given, classes in turn; or else as many, but at most a fifth, held out from `root`. Raises what
    `list_videos`, `ucf101_split` and `split_validation` raise.
    """
    if data.ucf101_split is not None:
        from .ucf101 import ucf101_split

        files, validation, classes = ucf101_split(data.root, data.ucf101_split, data.split_files)
        if data.num_validation_videos < len(validation):
            _, validation = split_validation(validation, data.num_validation_videos, seed)
    else:
        files, classes = list_videos(data.root)
        validation = None
    if data.validation_root is not None:
        validation, _ = list_videos(data.validation_root)
    elif validation is None:
        files, validation = split_validation(files, min(data.num_validation_videos, len(files) // 5), seed)
    return files, validation, classes


def list_training_videos(data: DataConfig) -> tuple[list[VideoFile], list[str]]:
    """All a recipe may train on, with nothing held out: `root`, or the train list of its `ucf101_split`.

    Raises what `list_videos` and `ucf101_split` raise.
    """
    if data.ucf101_split is None:
        return list_videos(data.root)
    from .ucf101 import ucf101_split

    files, _, classes = ucf101_split(data.root, data.ucf101_split, data.split_files)
    return files, classes


def split_validation(
    files: Sequence[VideoFile], num_validation: int, seed: int
) -> tuple[list[VideoFile], list[VideoFile]]:
    """Hold out `num_validation` files: (training, validation), in the given order, the same for the same seed.

    The classes take turns, in random order, so each gives at least one where `num_validation` allows, and a class
    gives its last file only when nothing else is left. A path listed twice stays on one side. Raises `UserError` if
    nothing would be left to train on.
    """
    by_class: dict[int | None, list[Path | ShardMember]] = defaultdict(list)
    for path, label in {file.path: file.label for file in files}.items():
        by_class[label].append(path)
    available = sum(map(len, by_class.values()))
    if not 0 <= num_validation < available:
        raise UserError(f"cannot hold out {num_validation} of {available} videos: choose from 0 to {available - 1}")

    rng = np.random.default_rng(seed)
    labels = sorted(by_class, key=lambda label: -1 if label is None else label)
    queues = [[by_class[label][i] for i in rng.permutation(len(by_class[label]))] for label in labels]
    queues = [queues[i] for i in rng.permutation(len(queues))]
    turns = [(place == len(queue) - 1, place, path) for queue in queues for place, path in enumerate(queue)]
    held = {path for *_, path in sorted(turns, key=lambda turn: turn[:2])[:num_validation]}
    return [file for file in files if file.path not in held], [file for file in files if file.path in held]


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

    Asked for by index, or by (epoch, index), which draws anew. A sample is a dict: `video` float32 (3, T, H, W) in
    [-1, 1]; `label` (-1 where there is none); `index`, the one asked for; `path` of the video that was read and
    `start` in it, in seconds; `skipped`, the list of (path, reason) of videos passed over because they are unreadable
    or too short: the next readable video takes their place.
    Raises what `list_videos` raises, and `VideoError` if no video at all is readable.
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
    ):
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

    def centred(self) -> ClipDataset:
        """The same videos, one clip from the middle of each."""
        return ClipDataset(self.files, self.num_frames, self.fps, self.size, train=False, classes=self.classes)

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
        frames = read_clip(path, start=start, fps=self.fps, num_frames=self.num_frames)
        # Resized as bytes, which is within one grey level of resizing floats, and five times as fast or more.
        pixels = crop(resize_to_cover(rearrange(frames, "t h w c -> c t h w"), self.size), self.size, down, across)
        if self.train and self.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        return {
            "video": frames_to_clip(rearrange(pixels.contiguous(), "c t h w -> t h w c")),
            "label": -1 if label is None else label,
            "index": index,
            "path": str(path),
            "start": start,
        }


def collate_clips(samples: Sequence[dict]) -> dict:
    """Stack samples of `ClipDataset`: `video` (B, 3, T, H, W), `label`, `index` and `start` (B,), `path` a list.

    `own` (B,) is false for a clip that stands in for an unreadable one, and will come again in its own place;
    `skipped` lists each (path, reason) once, in the order met.
    """
    return {
        "video": torch.stack([sample["video"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "start": torch.tensor([sample["start"] for sample in samples]),
        "path": [sample["path"] for sample in samples],
        "own": torch.tensor([not sample["skipped"] for sample in samples]),
        "skipped": list(dict.fromkeys(entry for sample in samples for entry in sample["skipped"])),
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
            with written_aside(self.file) as unfinished:
                unfinished.write_text("".join(lines), encoding="utf-8")
        return len(new)
