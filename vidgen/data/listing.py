"""List the videos of a data set and their classes: from folders, a CSV file, or shards.

Files that are not used as a user may expect (ignored files, videos that are missing or without a class) are noted in a
summary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..common.errors import UserError
from ..common.options import expand_home
from ..common.progress import progress
from .csv_table import TABLE_SUFFIXES, read_table
from .file_types import IgnoredFiles, has_video_extension, is_hidden
from .shards import INDEX, find_shards, read_shards
from .summary import format_note, list_names, summarize, to_printable
from .types import ArrayVideo, ShardMember, VideoFile

COMMON_EXTENSIONS = (".avi", ".mkv", ".mov", ".mp4", ".webm")  # named in messages
ARCHIVE_SUFFIXES = (".gz", ".tgz", ".zip", ".xz", ".bz2", ".zst", ".7z", ".rar")


def list_videos(
    root: str | os.PathLike, report: Callable[[str], object] | None = None
) -> tuple[list[VideoFile], list[str]]:
    """List the videos of a dataset, sorted by path, and the names of its classes, sorted.

    `root` is one of:

    - a folder, where a video's class is the folder that directly holds it, at any depth (the layout of UCF-101);
      videos directly in `root` have no class;
    - a CSV file, as in `vidgen.data.csv_table.read_table`, whose order is kept;
    - WebDataset shards, as in `vidgen.data.shards.find_shards`, in their order.

    Classes that are all whole numbers are sorted as numbers. A leading `~` is the home folder.

    Args:
        report: called with a summary: how many videos there are, of which classes, and what is ignored.

    Raises:
        UserError: if `root` does not exist, holds no video, or is ambiguous.
    """
    root = expand_home(root)
    found = _find(root)
    if not found.paths:
        raise UserError(_explain_no_videos(root, found.ignored))
    classes = found.classes
    present = {name for name in found.names if name is not None}
    if not present <= set(classes):  # only an index of shards lists classes beforehand
        numeric = all(name.isdecimal() for name in present)
        classes = sorted(present, key=lambda name: (int(name), name)) if numeric else sorted(present)
    for name in classes:
        if to_printable(name) != name:
            raise UserError(f"{to_printable(root)}: the class name {name!a} is not UTF-8; rename its folder")
    label_of = {name: label for label, name in enumerate(classes)}
    files = [
        VideoFile(path, None if name is None else label_of[name])
        for path, name in zip(found.paths, found.names, strict=True)
    ]
    if report is not None:
        report(summarize(root, files, classes, [*found.notes, *found.ignored.describe()]))
    return files, classes


def find_videos(root: Path) -> list[Path]:
    """Every video below a folder, sorted; links are followed, hidden files and folders ignored."""
    return _find_in_folder(Path(expand_home(root))).paths


def data_hash(root: str | os.PathLike, files: Sequence[VideoFile], classes: Sequence[str]) -> str:
    """SHA-256 over every video's path within `root`, size, modification time in seconds and class, in order.

    It covers names and times, not contents, to take only moments: a data set that is moved with its times (mv,
    rsync -a, tar) keeps its hash; a video that is written again changes it.
    """
    digest = hashlib.sha256()
    for path, label in files:
        is_member = isinstance(path, ShardMember)
        try:
            status = os.stat(path.shard if is_member else path)
            size, changed = path.size if is_member else status.st_size, int(status.st_mtime)
        except OSError:  # listed but missing: reported when it is read
            size, changed = -1, -1
        line = [relative_path(path, root), size, changed, None if label is None else classes[label]]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def content_hash(files: Sequence[VideoFile]) -> str:
    """SHA-256 over the contents of videos, in order; it depends on no name and no time, and reads every file.

    A file that cannot be read counts as empty. A file of arrays is read once for all of its videos.
    """
    digest, hash_of = hashlib.sha256(), lru_cache(maxsize=1)(_hash_bytes)
    for path, _ in progress(files, "hashing files"):
        if isinstance(path, ShardMember):
            line = [hash_of(path.shard, path.offset, path.size)]
        elif isinstance(path, ArrayVideo):
            line = [hash_of(path.file), path.member, path.index, path.layout, path.fps]
        else:
            line = [hash_of(path)]
        digest.update(json.dumps(line).encode() + b"\n")
    return digest.hexdigest()


def _hash_bytes(path: Path, offset: int = 0, size: int | None = None) -> str | None:
    """SHA-256 of a file, or of `size` bytes of it; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            remaining = os.fstat(file.fileno()).st_size if size is None else size
            while chunk := file.read(min(remaining, 1 << 20)):
                digest.update(chunk)
                remaining -= len(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def relative_path(path: Path | ShardMember, root: str | os.PathLike) -> str:
    """A video's path within its data set: below the folder, or below the folder of the CSV or the shards."""
    if isinstance(path, ShardMember):
        return f"{relative_path(path.shard, root)}/{path.name}"
    base = Path(root) if Path(root).is_dir() else Path(root).parent
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


# --- finding videos --------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    paths: list[Path | ShardMember]
    names: list[str | None]  # of their classes
    classes: list[str] = field(default_factory=list)  # where they are known beforehand
    notes: list[str] = field(default_factory=list)
    ignored: IgnoredFiles = field(default_factory=IgnoredFiles)


def _find(root: str) -> _Found:
    shards, path = find_shards(root), Path(root)
    if shards is not None:
        notes = _check_videos_beside(path, shards) if path.is_dir() else []
        ignored = IgnoredFiles()
        members, classes = read_shards(shards, ignored)
        names = [name for _, name in members]
        return _Found([member for member, _ in members], names, classes, notes + _note_unlabeled(names), ignored)
    if path.is_dir():
        return _find_in_folder(path)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        paths, names, notes = read_table(path)
        return _Found(list(paths), names, notes=notes + _note_unlabeled(names))
    if path.is_file() and has_video_extension(path.name):
        raise UserError(f"{root} is a single video, not a dataset; name the folder that holds it: {path.parent}")
    if path.is_file() and path.name.lower().endswith(ARCHIVE_SUFFIXES):
        raise UserError(f"{root} is not a dataset but a compressed archive; unpack it and name the folder")
    if path.exists():
        raise UserError(
            f"{root} is not a dataset: expected a folder of videos, shards, or a CSV file with a column 'path'"
        )
    raise UserError(f"no dataset at {root}: expected a folder of videos, shards, or a CSV file")


def _explain_no_videos(root: str, ignored: IgnoredFiles) -> str:
    if Path(root).suffix.lower() in TABLE_SUFFIXES:
        return f"no video in {root}: expected a first line path,label and a line for each video"
    expected = f"expected files ending in {', '.join(COMMON_EXTENSIONS)} or other video extensions that FFmpeg reads"
    return "; ".join([f"no video in {root}: {expected}", *ignored.describe()])


def _find_in_folder(root: Path) -> _Found:
    """Search a folder; links are followed, but not in circles, hidden files and folders ignored."""
    videos, folders, seen, unreadable, ignored = [], [], set(), [], IgnoredFiles()

    def note_error(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=note_error):
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(  # without hidden ones, and links that lead in circles
            name
            for name in subfolders
            if not is_hidden(name) and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        folders.append(Path(folder))
        paths = [Path(folder, name) for name in sorted(names) if not is_hidden(name)]
        accepted = [path for path in paths if ignored.accept(path.name, lambda path=path: path.open("rb"))]
        captions = {path.with_suffix(".txt") for path in accepted}.intersection(paths)
        ignored.extensions -= Counter(path.suffix for path in captions)
        videos += accepted
    videos.sort()
    names = [None if path.parent == root else path.parent.name for path in videos]
    return _Found(videos, names, [], _note_layout(root, videos, folders, unreadable), ignored)


def _note_layout(root: Path, videos: Sequence[Path], folders: Sequence[Path], unreadable: list[str]) -> list[str]:
    """Notes on videos and folders that do not follow the layout of one folder per class."""

    def relative(paths: Sequence[Path]) -> list[str]:
        return [path.relative_to(root).as_posix() for path in paths]

    outside = [path.name for path in videos if path.parent == root]
    class_folders = {path.parent for path in videos} - {root}
    mixed = sorted(class_folders & {outer for folder in class_folders for outer in folder.parents})
    places: dict[str, list[Path]] = defaultdict(list)
    for folder in sorted(class_folders):
        places[folder.name].append(folder)
    shared = sorted(name for name, same in places.items() if len(same) > 1)
    parents = {root, *(parent for path in videos for parent in path.parents)}
    empty = sorted(path for path in folders if path not in parents and path.parent in parents)  # the topmost ones
    return [
        *format_note(
            "videos outside the class folders, without class", outside if class_folders else (), total=len(videos)
        ),
        *format_note("class folders that hold other class folders beside videos", relative(mixed)),
        *format_note(
            "class names of several folders, merged into one class",
            relative(places[shared[0]]) if shared else (),
            count=len(shared),
        ),
        *format_note("folders without videos", relative(empty)),
        *format_note("folders that cannot be read", unreadable),
    ]


def _note_unlabeled(names: Sequence[str | None]) -> list[str]:
    """A note on videos without a class, where others have one."""
    count = sum(name is None for name in names)
    return format_note("videos without class", (), count=count if count < len(names) else 0, total=len(names))


def _check_videos_beside(folder: Path, shards: Sequence[Path]) -> list[str]:
    """A note on videos beside shards; raises `UserError` for folders of videos beside .tar files without an index."""
    videos = [path.relative_to(folder) for path in find_videos(folder)]
    in_folders = [path for path in videos if len(path.parts) > 1]
    if in_folders and shards[0].name != INDEX:
        raise UserError(
            f"{folder} holds both folders of videos (such as {in_folders[0]}) and shards "
            f"({list_names([shard.name for shard in shards])}): move the .tar files elsewhere to use the folders, or "
            f"name only the shards: {folder}/*.tar"
        )
    return format_note("ignored videos beside the shards", videos)
