"""Types shared by listing, shards, arrays and the video readers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class ShardMember(NamedTuple):
    """A video inside an uncompressed tar file, used in place of a path; `offset` and `size` are in bytes."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


class ArrayVideo(NamedTuple):
    """A video in a .npy or .npz file, used in place of a path.

    Attributes:
        file: the .npy or .npz file.
        member: name of the array in a .npz file; None for .npy.
        index: place of the video in the array's first axis; None if the array is one video.
        layout: order of the video's axes, a permutation of "TCHW".
        fps: frames per second; files of arrays state none.
    """

    file: Path
    member: str | None
    index: int | None
    layout: str
    fps: float

    def __str__(self) -> str:
        name = str(self.file) if self.member is None else f"{self.file}/{self.member}"
        return name if self.index is None else f"{name}[{self.index}]"


VideoSource = str | os.PathLike | ShardMember | ArrayVideo


class VideoFile(NamedTuple):
    """A video and its class: an index into the list of classes, or None."""

    path: Path | ShardMember | ArrayVideo
    label: int | None
