"""Captions of videos: from the column `caption` of a CSV, a .txt beside a video, or the .txt or .json of a shard.

A video may have several captions: separated by `|` in a field of a CSV, one per line of a .txt, or a list under
`caption` in a .json. A video without one is trained on without a caption.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..common.errors import UserError
from ..common.options import expand_home
from .csv_table import TABLE_SUFFIXES, read_caption_column
from .file_types import is_hidden
from .summary import to_printable
from .types import ArrayVideo, ShardMember, VideoFile

SEPARATOR = "|"  # of captions in a field of a CSV
MAX_CAPTION_FILE = 1 << 20  # bytes; a longer .txt is no list of captions
SURROGATE = re.compile(r"[\ud800-\udfff]")  # half of a pair, which no encoding of text can hold

# Captions of a video: none if it has no source of captions; one empty text if the source is empty.
Captions = tuple[str, ...]


def read_captions(root: str | os.PathLike, files: Sequence[VideoFile]) -> list[Captions]:
    """Read the captions of each video; () without any, and ("",) if its source is empty.

    Args:
        root, files: a data set and its videos, as `list_videos` takes and returns them.

    Raises:
        UserError: if a source of captions is not valid Unicode in UTF-8, a CSV, a shard or a .json in it cannot be
            read, or the `caption` of a .json is neither a text nor a list of texts.
    """
    table = Path(expand_home(root))
    if table.is_file() and table.suffix.lower() in TABLE_SUFFIXES:
        column = {path: _clean(_split_field(fields)) for path, fields in read_caption_column(table).items()}
        return [column.get(file.path) or _read_beside(file.path) for file in files]
    shards = sorted({file.path.shard for file in files if isinstance(file.path, ShardMember)})
    members = {shard: read_shard_captions(shard) for shard in shards}
    return [
        members[file.path.shard].get(_key(file.path.name), ())
        if isinstance(file.path, ShardMember)
        else _read_beside(file.path)
        for file in files
    ]


def read_shard_captions(shard: Path) -> dict[str, Captions]:
    """The captions in a tar file by key: the path of a member up to the first dot of its name.

    A .txt holds one caption per line, a .json one text or a list under `caption`; the .txt has priority. Raises
    `UserError` if one of them holds something else, or the tar file cannot be read.
    """
    captions: dict[str, Captions] = {}
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for entry in tar:
                name = os.path.basename(entry.name)
                extension = name.partition(".")[2].lower()
                if not entry.isfile() or is_hidden(name) or extension not in ("txt", "json"):
                    continue
                key, content = _key(entry.name), _read_limited(tar.extractfile(entry), f"{shard}/{entry.name}")
                if extension == "txt":
                    captions[key] = _clean(_decode(content, f"{shard}/{entry.name}").splitlines())
                elif (found := _parse_json(content, f"{shard}/{entry.name}")) is not None:
                    captions.setdefault(key, found)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard} cannot be read for captions ({error})") from error
    return captions


@dataclass(frozen=True)
class CaptionSummary:
    """Counts of the captions of a data set.

    Attributes:
        videos: number of videos.
        missing: videos without a source of captions.
        empty: videos whose captions are empty.
        distinct: number of different captions.
        longest: the longest caption.
        longest_path: its video.
    """

    videos: int
    missing: int
    empty: int
    distinct: int
    longest: str = ""
    longest_path: str = ""

    def __str__(self) -> str:
        counts = f"captions: {self.distinct:,} different of {self.videos:,} videos"
        if not self.distinct and self.missing == self.videos:
            return "captions: none"
        parts = [f"{self.missing:,} missing", f"{self.empty:,} empty"]
        if self.longest:
            parts.append(f"the longest has {len(self.longest):,} characters ({self.longest_path})")
        return to_printable(f"{counts}, {', '.join(parts)}")


def summarize_captions(files: Sequence[VideoFile], captions: Sequence[Captions]) -> CaptionSummary:
    """Count missing, empty and distinct captions, and find the longest."""
    texts = Counter(text for video in captions for text in video if text)
    longest = max(
        ((text, str(file.path)) for file, video in zip(files, captions, strict=True) for text in video),
        key=lambda pair: len(pair[0]),
        default=("", ""),
    )
    return CaptionSummary(
        videos=len(files),
        missing=sum(not video for video in captions),
        empty=sum(bool(video) and not any(video) for video in captions),
        distinct=len(texts),
        longest=longest[0],
        longest_path=longest[1] if longest[0] else "",
    )


def _split_field(fields: Iterable[str]) -> list[str]:
    return [part for field in fields for part in field.split(SEPARATOR)]


def _clean(captions: Iterable[str]) -> Captions:
    """Captions with single blanks between words, without empty ones; one empty caption if all are."""
    texts = (" ".join(caption.split()) for caption in captions)
    return tuple(text for text in texts if text) or ("",)


def _read_beside(path: Path | ArrayVideo) -> Captions:
    """The captions in the .txt beside a video; () without one."""
    if isinstance(path, ArrayVideo):
        return ()
    file = path.with_suffix(".txt")
    try:
        with file.open("rb") as content:
            text = _read_limited(content, str(file))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror or error})") from error
    return _clean(_decode(text, str(file)).splitlines())


def _read_limited(file: IO[bytes], name: str) -> bytes:
    content = file.read(MAX_CAPTION_FILE + 1)
    if len(content) > MAX_CAPTION_FILE:
        raise UserError(f"{name} has over {MAX_CAPTION_FILE:,} bytes, but should hold the captions of one video")
    return content


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not a text of captions in UTF-8 ({error}); save it in that encoding") from error


def _parse_json(content: bytes, name: str) -> Captions | None:
    """The text or list under `caption`; None without one, or if it is null."""
    try:
        metadata = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name} cannot be read as JSON in UTF-8 ({error}); correct it, or remove it") from error
    value = metadata.get("caption") if isinstance(metadata, dict) else None
    if value is None:
        return None
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{name}: caption must be a text or a list of texts, not {json.dumps(value):.60}")
    # UTF-8 excludes surrogates in the other sources; the escapes of a .json, and Python's reader of it, allow them.
    if half := SURROGATE.search("".join(captions)):
        raise UserError(
            f"{name}: a caption contains {half[0]!a}, which is half of a surrogate pair and no character: write the "
            r"character itself in UTF-8, or the escapes of both halves, such as \ud83d\ude42"
        )
    return _clean(captions)


def _key(member: str) -> str:
    folder, name = os.path.split(member)
    return f"{folder}/{name.partition('.')[0]}"
