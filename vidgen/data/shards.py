"""Read and write WebDataset shards: a data set in a few large tar files instead of many small ones.

    shard-000000.tar    00000000-NAME.mp4, 00000000-NAME.json, 00000001-...
    shard-000001.tar    ...
    index.json          the shards, and the place of each video in them

A tar file stores its members unchanged, so a video is read in place, in any order, with the same order, splits and
exact resume as a folder of videos. `index.json` is the index of webdataset's `wids` with two additions, `members` and
`classes`; shards without it, made by other programs, are searched once when opened.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.errors import UserError
from ..common.io import atomic_dir, refuse_to_replace
from ..common.options import expand_home
from .file_types import IgnoredFiles, has_video_extension, is_hidden, is_other_type
from .types import ShardMember, VideoFile, VideoSource

INDEX = "index.json"
OUTPUT_NAME = re.compile(r"shard-\d{6}\.tar|" + re.escape(INDEX))
END_OF_TAR = bytes(1024)  # two empty blocks
GLOB_CHARACTERS = re.compile(r"[*?[{]")
Member = tuple[ShardMember, str | None]  # a video and the name of its class


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    files: Sequence[VideoFile],
    classes: Sequence[str],
    folder: str | os.PathLike,
    *,
    shard_size_mb: float = 512,
    max_count: int = 10_000,
    report: Callable[[int], None] = lambda written: None,
    captions: Sequence[Sequence[str]] = (),
) -> list[tuple[str, str]]:
    """Write videos, byte for byte, with their classes as WebDataset shards and an index.

    Beside each video is a .json with `path` (its source), `class` and `label` (its number), and `caption`, a list.
    `folder` appears when it is complete; the same files give the same bytes.

    Args:
        files, classes: the results of `list_videos`.
        folder: a new or empty one, or one of such shards, which are replaced.
        shard_size_mb, max_count: a shard ends with the video that reaches one of them, in 10^6 bytes and videos.
        report: called after each video with their number so far.
        captions: of each video, from `read_captions`; empty for none.

    Returns:
        (path, reason) of the files that are left out because they cannot be read, or would not be listed as videos:
        by their extension, or by their content. Damaged videos are kept unchanged.

    Raises:
        UserError: if `folder` holds other files, no file can be read, or the disk is full.
    """
    from webdataset import ShardWriter

    folder = Path(folder)
    if shard_size_mb <= 0 or max_count < 1:
        raise UserError(f"shards need a positive size and 1 video or more, got {shard_size_mb} MB and {max_count}")
    refuse_to_replace(folder, OUTPUT_NAME)
    left_out: list[tuple[str, str]] = []
    limits = dict(maxsize=shard_size_mb * 1e6, maxcount=max_count, verbose=0, mtime=0)
    try:
        with atomic_dir(folder) as unfinished:
            unfinished.mkdir()
            with ShardWriter(str(unfinished).replace("%", "%%") + "/shard-%06d.tar", **limits) as shards:
                for number, (path, label) in enumerate(files):
                    try:
                        content = _read_bytes(path)
                    except OSError as error:
                        left_out.append((str(path), error.strerror or str(error)))
                        continue
                    if not has_video_extension(path.name):
                        left_out.append((str(path), "its extension is not one of videos; rename it"))
                        continue
                    if is_other_type(path.name, lambda content=content: io.BytesIO(content)):
                        left_out.append((str(path), "it holds text, a still image or only audio"))
                        continue
                    stem, extension = os.path.splitext(os.path.basename(path.name))
                    metadata = {"path": str(path)}
                    if label is not None:
                        metadata |= {"label": label, "class": classes[label]}
                    if captions and captions[number]:
                        metadata["caption"] = list(captions[number])
                    key = f"{number:08}-{stem.replace('.', '_')}"  # a dot would end the key
                    shards.write({"__key__": key, extension[1:].lower(): content, "json": json.dumps(metadata)})
                    report(number + 1)
            if len(left_out) == len(files):
                raise UserError(f"{folder}: no video to write" + "".join(f" ({p}: {r})" for p, r in left_out[:1]))
            _write_index(unfinished, classes)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return left_out


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
        entries = [[member.name, member.offset, member.size, name] for member, name in members]
        size = shard.stat().st_size
        shards.append({"url": shard.name, "nsamples": len(members), "filesize": size, "members": entries})
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards, "classes": list(classes)}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


# --- reading ---------------------------------------------------------------------------------------------------------


def find_shards(root: str | os.PathLike) -> list[Path] | None:
    """The shards, or the index, that `root` names; None if it names no shards.

    `root`: a folder that holds .tar files, one such file, an index by `write_shards` (.json), or a pattern with *, ?,
    [] or braces: "shard-{000000..000012}.tar". A leading `~` is the home folder. Raises `UserError` for a pattern that
    matches no file, or matches videos or folders.
    """
    text = expand_home(root)
    path = Path(text)
    if path.is_dir():
        tars = sorted(tar for tar in path.iterdir() if tar.suffix.lower() == ".tar" and not is_hidden(tar.name))
        return [path / INDEX] if tars and (path / INDEX).is_file() else tars or None
    if path.is_file():
        return [path] if path.suffix.lower() in (".tar", ".json") else None
    if not GLOB_CHARACTERS.search(text):
        return None
    from braceexpand import UnbalancedBracesError, braceexpand

    try:
        patterns = list(braceexpand(text))
    except UnbalancedBracesError as error:
        raise UserError(f"{text} has braces that do not match") from error
    shards: list[Path] = []
    for pattern in patterns:
        matches = [Path(match) for match in sorted(glob.glob(pattern))]
        if has_video_extension(pattern) or any(match.is_dir() or has_video_extension(match.name) for match in matches):
            plain = next(number for number, part in enumerate(path.parts) if GLOB_CHARACTERS.search(part))
            raise UserError(
                f"{text} is a pattern of videos or folders, which cannot name a dataset: give the folder that holds "
                f"them, {Path(*path.parts[:plain])}, or a CSV file that lists the videos"
            )
        if not matches:
            raise UserError(f"no shard at {pattern}")
        shards += matches
    return shards


def read_shards(shards: Iterable[Path], ignored: IgnoredFiles | None = None) -> tuple[list[Member], list[str]]:
    """The videos in shards, in order, each with the name of its class; and the classes if an index lists them.

    If no video has a class, the folder within its shard that directly holds it is its class, as when the shard is
    unpacked. Other files are added to `ignored`. Raises `UserError` for a shard that is missing, cut off, or not an
    uncompressed tar file.
    """
    members: list[Member] = []
    classes: list[str] = []
    is_indexed = False
    for shard in shards:
        if shard.suffix.lower() == ".json":
            indexed, classes = _read_index(shard)
            members, is_indexed = members + indexed, True
        else:
            members += search_shard(shard, ignored)
    if not is_indexed and all(name is None for _, name in members):
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
    for shard, size, entries in shards:
        if not shard.is_file():
            raise UserError(f"{index} lists {shard.name}, which is missing beside it")
        if (actual := shard.stat().st_size) != size:
            raise UserError(
                f"{shard} has {actual} bytes where {index.name} says {size}: it is cut off or another file"
            )
        members += [(ShardMember(shard, name, offset, length), label) for name, offset, length, label in entries]
    return members, classes


def search_shard(shard: Path, ignored: IgnoredFiles | None = None) -> list[Member]:
    """The videos in a tar file, with the classes stated in a .json (`class`, `label`) or .cls with the same key.

    Hidden files are left out, as in folders; other files but captions are added to `ignored`. Raises `UserError` for a
    file that is not an uncompressed tar file, or is cut off.
    """
    ignored = IgnoredFiles() if ignored is None else ignored
    videos: list[tuple[str, ShardMember]] = []
    names: dict[str, str] = {}
    texts: list[str] = []  # keys of .txt files
    places: dict[str, tuple[int, int]] = {}  # offset and size, for hard links
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for entry in tar:
                if entry.isfile() and entry.offset_data + entry.size > size:
                    raise tarfile.ReadError(f"{entry.name} lies beyond its end")
                if any(is_hidden(part) for part in PurePosixPath(entry.name).parts if part != ".."):
                    continue
                # Hard links share the content of an earlier file; other links are ignored.
                if entry.isfile():
                    places[entry.name] = entry.offset_data, entry.size
                elif not (entry.islnk() and entry.linkname in places):
                    if entry.issym() or entry.islnk():
                        ignored.links.append(entry.name)
                    continue
                folder, name = os.path.split(entry.name)
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}", extension.lower()
                if extension in ("json", "cls"):
                    parse_class = _parse_json_class if extension == "json" else _parse_cls
                    label = parse_class(tar.extractfile(entry).read())
                    if label is not None and (extension == "json" or key not in names):
                        names[key] = label
                elif ignored.accept(name, lambda entry=entry: tar.extractfile(entry)):
                    place = places[entry.name if entry.isfile() else entry.linkname]
                    videos.append((key, ShardMember(shard, entry.name, *place)))
                elif extension == "txt" and entry.isfile():
                    texts.append(key)
            file.seek(max(0, size - len(END_OF_TAR)))
            if file.read() != END_OF_TAR:
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        raise UserError(f"{shard} is not a whole, uncompressed tar file ({error}); make or copy it again") from error
    except OSError as error:
        raise UserError(f"{shard} cannot be read ({error.strerror or error})") from error
    with_video = {key for key, _ in videos}
    ignored.extensions -= Counter(".txt" for key in texts if key in with_video)
    return [(member, names.get(key)) for key, member in videos]


def _parse_cls(content: bytes) -> str | None:
    return content.decode("utf-8", "replace").strip() or None


def _parse_json_class(content: bytes) -> str | None:
    try:
        metadata: Any = json.loads(content)
    except ValueError:
        return None
    if not isinstance(metadata, dict):
        return None
    values = (metadata.get(key) for key in ("class", "label"))
    return next((text for value in values if value is not None and (text := str(value).strip())), None)
