"""Data sets of the benchmark: lists of training and test videos, their groups, and clips in memory."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vidgen.common.errors import UserError
from vidgen.common.images import to_uint8
from vidgen.common.progress import progress
from vidgen.data.dataset import ClipDataset
from vidgen.data.listing import list_videos

Lists = Sequence[Path]


@dataclass(frozen=True)
class Clips:
    """Clips of equal size in memory, as bytes.

    Attributes:
        pixels: uint8 (N, 3, T, H, W).
        labels: name of each clip's class.
        paths: of their videos.
        groups: of each clip, whose clips are alike and are resampled together: that of a table, else its video.
        data: name of each clip's data set, the folder of its list.
    """

    pixels: torch.Tensor
    labels: list[str]
    paths: list[str]
    groups: list[str]
    data: list[str]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def videos(self) -> torch.Tensor:
        """All clips as floats, (N, 3, T, H, W) in [-1, 1]."""
        return to_float(self.pixels)

    def select(self, indices: Sequence[int]) -> Clips:
        """The clips of these indices."""
        columns = ([column[i] for i in indices] for column in (self.labels, self.paths, self.groups, self.data))
        return Clips(self.pixels[list(indices)], *columns)

    def of(self, data: str) -> Clips:
        """The clips of one data set."""
        return self.select([i for i, name in enumerate(self.data) if name == data])


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes as floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def read_clips(
    lists: Lists,
    clip_shape: tuple[int, int, int, int],
    fps: float,
    clips_per_video: int,
    groups: dict[str, str] | None = None,
    limit: int | None = None,
    **augmentation: float | bool,
) -> Clips:
    """Read clips of all videos that are long enough.

    Args:
        lists: roots as in `list_videos`.
        clip_shape: (3, T, H, W).
        groups: by absolute path, from `read_groups`.
        limit: the most clips of each list, evenly spaced over its videos.
        augmentation: arguments of `ClipDataset`; none: clips from evenly spaced starts, center crops.

    Raises:
        UserError: if a list cannot be read, has a video without class, or no video is long enough.
    """
    pixels, labels, paths, names, data = [], [], [], [], []
    for root in lists:
        files, classes = list_videos(root)
        if any(label is None for _, label in files):
            raise UserError(f"{root}: every video needs a class, in a column 'label'.")
        settings = {"train": False} | augmentation
        dataset = ClipDataset(
            files, clip_shape[1], fps, clip_shape[2:], clips_per_video=clips_per_video, classes=classes, **settings
        )
        unusable = {path for path, _ in dataset.check()}
        indices = [i for i in range(len(dataset)) if str(files[i % len(files)].path) not in unusable]
        if limit is not None and len(indices) > limit:
            indices = [indices[i * len(indices) // limit] for i in range(limit)]
        for index in progress(indices, f"reading {Path(root).parent.name}"):
            sample = dataset[index]
            if sample["skipped"]:
                continue
            pixels.append(to_uint8(sample["video"]))
            labels.append(classes[sample["label"]])
            paths.append(sample["path"])
            names.append((groups or {}).get(str(Path(sample["path"]).resolve()), sample["path"]))
            data.append(name_of(root))
    if not pixels:
        raise UserError(f"{', '.join(map(str, lists))}: no video could be read.")
    return Clips(torch.stack(pixels), labels, paths, names, data)


def name_of(root: Path) -> str:
    """Name of a data set: the folder of its list, or the folder's own parent."""
    return Path(root).resolve().parent.name


def read_groups(tables: Sequence[Path]) -> dict[str, str]:
    """Groups by absolute path, from CSV tables with the columns `path` (relative to the table) and `group`.

    Raises:
        UserError: as `read_rows`.
    """
    rows = [(name_of(table), row) for table in tables for row in read_rows(table, "group")]
    return {row["path"]: f"{name}/{row['group']}" for name, row in rows}


def read_rows(table: str | Path, column: str) -> list[dict[str, str]]:
    """The rows of a CSV table, with absolute paths.

    Raises:
        UserError: if the table cannot be read, has no columns `path` and `column`, or a row lacks one of them.
    """
    table = Path(table)
    try:
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} cannot be read ({error}).") from error
    if not {"path", column} <= set(columns):
        raise UserError(f"{table} needs a first line with the columns path and {column}.")
    for row in rows:
        if not row["path"] or not row[column]:
            raise UserError(f"{table}: a row needs both path and {column}: {','.join(map(str, row.values()))}.")
    return [row | {"path": str((table.resolve().parent / row["path"]).resolve())} for row in rows]
