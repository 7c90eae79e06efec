"""WebDataset shards: a data set in a few large tar files instead of many small ones.

    shard-000000.tar    00000000-NAME.mp4, 00000000-NAME.json, 00000001-...
    shard-000001.tar    ...
    index.json          which shards there are, and where in them each video lies

A tar file keeps its members as they are, so a video is read in place, in any order, and everything that holds for a
folder of videos (order, splits, exact resume) holds for shards. `index.json` is the index of webdataset's own `wids`
with two additions, `members` and `classes`; shards made by others, which lack it, are searched once when opened.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import refuse_to_replace, written_aside_folder
from .video import VIDEO_EXTENSIONS, ShardMember, VideoSource

if TYPE_CHECKING:
    from .dataset import VideoFile

INDEX = "index.json"
OURS = re.compile(r"shard-\d{6}\.tar|" + re.escape(INDEX))
END_OF_TAR = bytes(1024)  # two empty blocks
Member = tuple[ShardMember, str | None]  # a video and the name of its class


# --- writing --------------------------------------------------------------------------------------------------------


def write_shards(
    files: Sequence[VideoFile],
    classes: Sequence[str],
    folder: str | os.PathLike,
    *,
    shard_size_mb: float = 512,
    max_count: int = 10_000,
    report: Callable[[int], None] = lambda written: None,
) -> list[tuple[str, str]]:
    """Write videos, byte for byte, with their classes as WebDataset shards and an index.

    Beside each video lies a .json with `path` (where it came from), `class` and `label` (its number). `folder`
    appears when it is whole, or not at all; the same files give the same bytes.

    Args:
        files, classes: as `list_videos` gives them.
        folder: a new or empty one, or one of such shards, which are replaced.
        shard_size_mb, max_count: a shard ends with the video that reaches one of them, in 10^6 bytes and videos.
        report: called after each video with how many there were.

    Returns:
        (path, reason) of the files that could not be read and are left out. Damaged videos are kept as they are.

    Raises:
        UserError: if `folder` holds other things, no file can be read, or the disk is full.
    """
    from webdataset import ShardWriter

    folder = Path(folder)
    if shard_size_mb <= 0 or max_count < 1:
        raise UserError(f"shards need a positive size and 1 video or more, got {shard_size_mb} MB and {max_count}")
    refuse_to_replace(folder, OURS)
    unreadable: list[tuple[str, str]] = []
    try:
        with written_aside_folder(folder) as aside:
            aside.mkdir()
            limits = dict(maxsize=shard_size_mb * 1e6, maxcount=max_count, verbose=0, mtime=0)
            with ShardWriter(str(aside).replace("%", "%%") + "/shard-%06d.tar", **limits) as shards:
                for number, (path, label) in enumerate(files):
                    try:
                        content = _read_bytes(path)
                    except OSError as error:
                        unreadable.append((str(path), error.strerror or str(error)))
                        continue
                    stem, ending = os.path.splitext(os.path.basename(path.name))
                    described = {"path": str(path)}
                    if label is not None:
                        described |= {"label": label, "class": classes[label]}
                    key = f"{number:08}-{stem.replace('.', '_')}"  # a dot would end the key
                    shards.write({"__key__": key, ending[1:].lower(): content, "json": json.dumps(described)})
                    report(number + 1)
            if len(unreadable) == len(files):
                raise UserError(f"{folder}: no video to write" + "".join(f" ({p}: {r})" for p, r in unreadable[:1]))
            _write_index(aside, classes)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return unreadable


def _read_bytes(source: VideoSource) -> bytes:
    if not isinstance(source, ShardMember):
        return Path(source).read_bytes()
    with source.shard.open("rb") as shard:
        shard.seek(source.offset)
        return shard.read(source.size)


def _write_index(folder: Path, classes: Sequence[str]) -> None:
    shards = []
    for shard in sorted(folder.glob("*.tar")):
        members = search_shard(shard)
        described = [[member.name, member.offset, member.size, name] for member, name in members]
        size = shard.stat().st_size
        shards.append({"url": shard.name, "nsamples": len(members), "filesize": size, "members": described})
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "classes": list(classes)}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


# --- reading --------------------------------------------------------------------------------------------------------


def find_shards(root: str | os.PathLike) -> list[Path] | None:
    """The shards, or the index, that `root` names; None where it names something else.

    `root`: a folder that holds .tar files, one such file, an index of ours (.json), or a pattern with *, ?, [] or
    braces: "shard-{000000..000012}.tar". Raises `UserError` for a pattern that fits no file, or a shard missing.
    """
    text, path = os.fspath(root), Path(root)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        return [path / INDEX] if tars and (path / INDEX).is_file() else tars or None
    if path.is_file():
        return [path] if path.suffix.lower() in (".tar", ".json") else None
    if not re.search(r"[*?[{]", text):
        return None
    from braceexpand import braceexpand

    found: list[Path] = []
    for pattern in braceexpand(text):
        matches = sorted(glob.glob(pattern))
        if not matches:
            raise UserError(f"no shard at {pattern}")
        found += map(Path, matches)
    return found


def read_shards(shards: Iterable[Path]) -> tuple[list[Member], list[str]]:
    """The videos in shards, in order, each with the name of its class; and the classes if an index says them.

    Raises `UserError` for a shard that is missing, cut off, or no plain tar file.
    """
    members: list[Member] = []
    classes: list[str] = []
    for shard in shards:
        if shard.suffix.lower() == ".json":
            found, classes = _read_index(shard)
            members += found
        else:
            members += search_shard(shard)
    return members, classes


def _read_index(index: Path) -> tuple[list[Member], list[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = [(index.parent / shard["url"], shard["filesize"], shard["members"]) for shard in content["shardlist"]]
        classes = content["classes"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{index} is not an index that `vidgen shards` writes; name the .tar files instead") from error
    members: list[Member] = []
    for shard, size, described in shards:
        if not shard.is_file():
            raise UserError(f"{index} lists {shard.name}, which is missing beside it")
        if (there := shard.stat().st_size) != size:
            raise UserError(f"{shard} has {there} bytes where {index.name} says {size}: it is cut off or another file")
        members += [(ShardMember(shard, name, offset, length), kind) for name, offset, length, kind in described]
    return members, classes


def search_shard(shard: Path) -> list[Member]:
    """The videos in a tar file by its headers, with the class that a .json (`class`, `label`) or .cls beside says.

    Raises `UserError` for what is no plain tar file, or one that is cut off.
    """
    videos: list[tuple[str, ShardMember]] = []
    names: dict[str, str] = {}
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.offset_data + entry.size > size:
                    raise tarfile.ReadError(f"{entry.name} lies beyond its end")
                if not entry.isfile():
                    continue
                folder, name = os.path.split(entry.name)
                key, _, ending = name.partition(".")
                key = f"{folder}/{key}"
                if f".{ending.rpartition('.')[2].lower()}" in VIDEO_EXTENSIONS:
                    videos.append((key, ShardMember(shard, entry.name, entry.offset_data, entry.size)))
                elif ending == "json":
                    if (name := _class_in_json(tar.extractfile(entry).read())) is not None:
                        names[key] = name
                elif ending == "cls":
                    names.setdefault(key, tar.extractfile(entry).read().decode("utf-8", "replace").strip())
            file.seek(max(0, size - len(END_OF_TAR)))
            if file.read() != END_OF_TAR:
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{shard} is not a whole, uncompressed tar file ({error}); make or copy it again") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror or error})") from error
    return [(member, names.get(key)) for key, member in videos]


def _class_in_json(content: bytes) -> str | None:
    try:
        described: Any = json.loads(content)
    except ValueError:
        return None
    if not isinstance(described, dict):
        return None
    name = described.get("class", described.get("label"))
    return None if name is None else str(name)
