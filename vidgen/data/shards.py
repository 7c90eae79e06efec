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
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.errors import UserError
from ..common.io import atomic_dir, refuse_to_replace
from ..common.options import expand_home
from .formats import LeftOut, has_video_ending, is_hidden, is_other_content
from .types import ShardMember, VideoFile, VideoSource

INDEX = "index.json"
OURS = re.compile(r"shard-\d{6}\.tar|" + re.escape(INDEX))
END_OF_TAR = bytes(1024)  # two empty blocks
SIDECARS = ("json", "cls")  # endings of files that describe the video of the same key
MAGIC = re.compile(r"[*?[{]")
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
        (path, reason) of the files that are left out because they cannot be read, or would not be found again: their
        ending is no video's, or they hold something else. Damaged videos are kept as they are.

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
        with atomic_dir(folder) as aside:
            aside.mkdir()
            limits = dict(maxsize=shard_size_mb * 1e6, maxcount=max_count, verbose=0, mtime=0)
            with ShardWriter(str(aside).replace("%", "%%") + "/shard-%06d.tar", **limits) as shards:
                for number, (path, label) in enumerate(files):
                    try:
                        content = _read_bytes(path)
                    except OSError as error:
                        unreadable.append((str(path), error.strerror or str(error)))
                        continue
                    if not has_video_ending(path.name):
                        unreadable.append((str(path), "its ending is not one of videos; rename it"))
                        continue
                    if is_other_content(path.name, io.BytesIO(content)):
                        unreadable.append((str(path), "it holds text, a still image or only sound"))
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
    braces: "shard-{000000..000012}.tar". A leading `~` is the home folder. Raises `UserError` for a pattern that fits
    no file, or fits videos or folders, or a shard missing.
    """
    text = expand_home(root)
    path = Path(text)
    if path.is_dir():
        tars = sorted(tar for tar in path.iterdir() if tar.suffix.lower() == ".tar" and not is_hidden(tar.name))
        return [path / INDEX] if tars and (path / INDEX).is_file() else tars or None
    if path.is_file():
        return [path] if path.suffix.lower() in (".tar", ".json") else None
    if not MAGIC.search(text):
        return None
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        patterns = list(braceexpand(text))
    except UnbalancedBracesError as error:
        raise UserError(f"{text} has braces that do not match") from error
    found: list[Path] = []
    for pattern in patterns:
        matches = [Path(match) for match in sorted(glob.glob(pattern))]
        if has_video_ending(pattern) or any(match.is_dir() or has_video_ending(match.name) for match in matches):
            raise UserError(_refuse_pattern(text))
        if not matches:
            raise UserError(f"no shard at {pattern}")
        found += matches
    return found


def _refuse_pattern(pattern: str) -> str:
    parts = Path(pattern).parts
    plain = next(number for number, part in enumerate(parts) if MAGIC.search(part))
    return (
        f"{pattern} is a pattern of videos or folders, which cannot name a dataset: give the folder that holds them, "
        f"{Path(*parts[:plain])}, or a CSV file that lists the videos"
    )


def read_shards(shards: Iterable[Path], left_out: LeftOut | None = None) -> tuple[list[Member], list[str]]:
    """The videos in shards, in order, each with the name of its class; and the classes if an index says them.

    Where no video at all has a class, the folder within its shard that directly holds it is its class, as when the
    shard is unpacked. Files that are not taken for videos are added to `left_out`.

    Raises `UserError` for a shard that is missing, cut off, or no plain tar file.
    """
    members: list[Member] = []
    classes: list[str] = []
    indexed = False
    for shard in shards:
        if shard.suffix.lower() == ".json":
            found, classes = _read_index(shard)
            members, indexed = members + found, True
        else:
            members += search_shard(shard, left_out)
    if not indexed and all(name is None for _, name in members):
        members = [(member, PurePosixPath(member.name).parent.name or None) for member, _ in members]
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


def search_shard(shard: Path, left_out: LeftOut | None = None) -> list[Member]:
    """The videos in a tar file by its headers, with the class that a .json (`class`, `label`) or .cls beside says.

    Hidden files are left out, as in folders; others that are not taken for videos are added to `left_out`. Raises
    `UserError` for what is no plain tar file, or one that is cut off.
    """
    left_out = LeftOut() if left_out is None else left_out
    videos: list[tuple[str, ShardMember]] = []
    names: dict[str, str] = {}
    places: dict[str, tuple[int, int]] = {}  # offset and size, for hard links
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isfile() and entry.offset_data + entry.size > size:
                    raise tarfile.ReadError(f"{entry.name} lies beyond its end")
                if any(is_hidden(part) for part in PurePosixPath(entry.name).parts if part != ".."):
                    continue
                if entry.isfile():
                    places[entry.name] = entry.offset_data, entry.size
                elif not (entry.islnk() and entry.linkname in places):
                    if entry.issym() or entry.islnk():
                        left_out.links.append(entry.name)
                    continue
                folder, name = os.path.split(entry.name)
                key, _, ending = name.partition(".")
                key = f"{folder}/{key}"
                if ending.lower() in SIDECARS:
                    described = _class_in_sidecar(ending.lower(), tar.extractfile(entry).read())
                    if described is not None and (ending.lower() == "json" or key not in names):
                        names[key] = described
                elif left_out.admit(name, lambda entry=entry: tar.extractfile(entry)):
                    place = places[entry.name if entry.isfile() else entry.linkname]
                    videos.append((key, ShardMember(shard, entry.name, *place)))
            file.seek(max(0, size - len(END_OF_TAR)))
            if file.read() != END_OF_TAR:
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{shard} is not a whole, uncompressed tar file ({error}); make or copy it again") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror or error})") from error
    return [(member, names.get(key)) for key, member in videos]


def _class_in_sidecar(kind: str, content: bytes) -> str | None:
    """The class that a .json or .cls names; None where it names none."""
    if kind == "cls":
        return content.decode("utf-8", "replace").strip() or None
    return _class_in_json(content)


def _class_in_json(content: bytes) -> str | None:
    try:
        described: Any = json.loads(content)
    except ValueError:
        return None
    if not isinstance(described, dict):
        return None
    named = (described.get(key) for key in ("class", "label"))
    return next((text for name in named if name is not None and (text := str(name).strip())), None)
