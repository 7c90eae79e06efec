"""Types shared by listing, shards and the video readers."""

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


VideoSource = str | os.PathLike | ShardMember


class VideoFile(NamedTuple):
    """A video and its class: an index into the list of classes, or None."""

    path: Path | ShardMember
    label: int | None
