"""Which videos a data set has, and of which classes: from a folder, a CSV file, or shards.

What is not used as a user may expect (files that are left out, videos without a class or missing) is collected for a
summary, which programs print before they train.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.errors import UserError
from ..common.options import expand_home
from .config import DataConfig
from .formats import COMMON_EXTENSIONS, LeftOut, are, count, has_video_ending, is_hidden, some
from .shards import INDEX, find_shards, read_shards
from .tables import TABLE_SUFFIXES, read_table
from .types import ShardMember, VideoFile

SHOWN_CLASSES = 5
Report = Callable[[str], object]


# --- one data set ---------------------------------------------------------------------------------------------------


def list_videos(root: str | os.PathLike, report: Report | None = None) -> tuple[list[VideoFile], list[str]]:
    """List the videos of a dataset, sorted by path, and the names of its classes, sorted.

    `root` is one of:

    - a folder, where a video's class is the folder that directly holds it, at any depth (the layout of UCF-101);
      videos directly in `root` have none;
    - a CSV file, as `vidgen.data.tables.read_table` takes it, whose order is kept;
    - WebDataset shards, as `vidgen.data.shards.find_shards` takes them, in their order.

    Classes that are all whole numbers are sorted as numbers. A leading `~` is the home folder.

    Args:
        report: called with a summary: how many videos there are, of which classes, and what is left out.

    Raises:
        UserError: if there is no such thing, no video in it, or it can be read in two ways.
    """
    root = expand_home(root)
    found = _find(root)
    if not found.paths:
        raise UserError(_nothing_found(root, found.left_out))
    classes = found.classes
    present = {name for name in found.names if name is not None}
    if not present <= set(classes):  # only an index of shards knows them beforehand
        numeric = all(name.isdecimal() for name in present)
        classes = sorted(present, key=lambda name: (int(name), name)) if numeric else sorted(present)
    for name in classes:
        if not _is_utf8(name):
            raise UserError(f"{_printable(root)}: the class name {name!a} is not UTF-8; rename its folder")
    label_of = {name: label for label, name in enumerate(classes)}
    files = [
        VideoFile(path, None if name is None else label_of[name])
        for path, name in zip(found.paths, found.names, strict=True)
    ]
    if report is not None:
        report(summarize(root, files, classes, [*found.notes, *found.left_out.describe()]))
    return files, classes


def find_videos(root: Path) -> list[Path]:
    """Every video below a folder, sorted; links are followed, hidden files and folders left out."""
    return _scan_folder(Path(expand_home(root))).videos


@dataclass
class _Found:
    paths: list[Path | ShardMember]
    names: list[str | None]  # of their classes
    classes: list[str] = field(default_factory=list)  # where they are known beforehand
    notes: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def _find(root: str) -> _Found:
    shards, path = find_shards(root), Path(root)
    if shards is not None:
        notes = _check_videos_beside(path, shards) if path.is_dir() else []
        left_out = LeftOut()
        members, classes = read_shards(shards, left_out)
        names = [name for _, name in members]
        return _Found([member for member, _ in members], names, classes, notes + _note_unlabeled(names), left_out)
    if path.is_dir():
        return _find_in_folder(path)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        paths, names, notes = read_table(path)
        return _Found(list(paths), names, notes=notes + _note_unlabeled(names))
    if path.is_file() and has_video_ending(path.name):
        raise UserError(f"{root} is a single video, not a dataset; name the folder that holds it: {path.parent}")
    if path.is_file() and path.name.lower().endswith((".gz", ".tgz", ".zip", ".xz", ".bz2", ".zst", ".7z", ".rar")):
        raise UserError(f"{root} is not a dataset but a compressed archive; unpack it and name the folder")
    if path.exists():
        raise UserError(
            f"{root} is not a dataset: expected a folder of videos, shards, or a CSV file with a column 'path'"
        )
    raise UserError(f"no dataset at {root}: expected a folder of videos, shards, or a CSV file")


def _find_in_folder(root: Path) -> _Found:
    scan = _scan_folder(root)
    names = [None if path.parent == root else path.parent.name for path in scan.videos]
    notes = []
    strays = [path.name for path in scan.videos if path.parent == root]
    if strays and len(strays) < len(names):
        verb, have = ("lie", "have") if len(strays) > 1 else ("lies", "has")
        notes.append(
            f"{count(len(strays), 'video')} of {len(names):,} {verb} outside the class folders and {have} no class "
            f"({some(strays)})"
        )
    folders: dict[str, set[Path]] = defaultdict(set)
    for path, name in zip(scan.videos, names, strict=True):
        if name is not None:
            folders[name].add(path.parent)
    direct = {path.parent for path in scan.videos} - {root}
    mixed = sorted(direct & {outer for folder in direct for outer in folder.parents})
    if mixed:
        notes.append(
            f"{count(len(mixed), 'class folder')} {'hold' if len(mixed) > 1 else 'holds'} other class folders beside "
            f"videos ({some([folder.relative_to(root).as_posix() for folder in mixed])})"
        )
    shared = sorted(name for name, places in folders.items() if len(places) > 1)
    if shared:
        places = [place.relative_to(root).as_posix() for place in sorted(folders[shared[0]])]
        notes.append(
            f"{count(len(shared), 'class name')} {'occurs' if len(shared) == 1 else 'occur'} in several folders, "
            f"counted as one class {'each ' if len(shared) > 1 else ''}({some(places)})"
        )
    if scan.empty:
        notes.append(
            f"{count(len(scan.empty), 'folder')} {'hold' if len(scan.empty) > 1 else 'holds'} no video "
            f"({some([path.relative_to(root).as_posix() for path in scan.empty])})"
        )
    if scan.unreadable:
        notes.append(f"{count(len(scan.unreadable), 'folder')} cannot be read ({some(scan.unreadable)})")
    return _Found(list(scan.videos), names, [], notes, scan.left_out)


def _note_unlabeled(names: Sequence[str | None]) -> list[str]:
    """A remark on videos without a class beside others that have one."""
    without = sum(name is None for name in names)
    if without in (0, len(names)):
        return []
    return [f"{count(without, 'video')} of {len(names):,} {'have' if without > 1 else 'has'} no class"]


def _check_videos_beside(folder: Path, shards: Sequence[Path]) -> list[str]:
    """A remark on videos that lie beside shards; raises `UserError` for folders of videos beside mere .tar files."""
    videos = [path.relative_to(folder) for path in find_videos(folder)]
    in_folders = [path for path in videos if len(path.parts) > 1]
    if in_folders and shards[0].name != INDEX:
        raise UserError(
            f"{folder} holds both folders of videos ({count(len(in_folders), 'video')}, such as {in_folders[0]}) and "
            f"shards ({some([shard.name for shard in shards])}): move the .tar files elsewhere to use the folders, or "
            f"name the shards alone: {folder}/*.tar"
        )
    if not videos:
        return []
    return [f"{count(len(videos), 'video')} beside the shards {are(len(videos))} left out ({some(videos)})"]


def _nothing_found(root: str, left_out: LeftOut) -> str:
    if Path(root).suffix.lower() in TABLE_SUFFIXES:
        return f"no video in {root}: expected a first line path,label and a line for each video"
    notes = left_out.describe()
    expected = f"expected files ending in {', '.join(COMMON_EXTENSIONS)} or as other videos that FFmpeg reads"
    return f"no video in {root}: {expected}" + (f", and {'; '.join(notes)}" if notes else "")


@dataclass
class _Scan:
    videos: list[Path]  # sorted
    empty: list[Path]  # the topmost folders without any video below them, sorted
    unreadable: list[str]
    left_out: LeftOut


def _scan_folder(root: Path) -> _Scan:
    """Look through a folder; links are followed, but not in circles, hidden files and folders left out."""
    found, folders, seen, unreadable, left_out = [], [], set(), [], LeftOut()

    def note(error: OSError) -> None:
        unreadable.append(f"{error.filename}: {error.strerror}")

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=note):
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(  # no hidden ones, and no links that lead in circles
            name
            for name in subfolders
            if not is_hidden(name) and os.path.realpath(os.path.join(folder, name)) not in seen
        )
        folders.append(Path(folder))
        for path in (Path(folder, name) for name in sorted(names) if not is_hidden(name)):
            if left_out.admit(path.name, lambda path=path: path.open("rb")):
                found.append(path)
    full = {parent for path in found for parent in path.parents}
    empty = [path for path in folders if path not in full and path != root and (path.parent in {root} | full)]
    return _Scan(sorted(found), sorted(empty), unreadable, left_out)


# --- the summary ----------------------------------------------------------------------------------------------------


def summarize(name: str, files: Sequence[VideoFile], classes: Sequence[str], notes: Sequence[str] = ()) -> str:
    """A data set in a few lines: videos, classes, the first names, and below them all that may surprise.

    Every file is looked up (not opened), to count those that do not exist or are listed more than once.
    """
    named = f"{count(len(classes), 'class', 'classes')} ({some(classes, SHOWN_CLASSES)})" if classes else "no classes"
    notes = [*notes, *_file_notes(files, classes)]
    lines = [f"{name}: {count(len(files), 'video')}, {named}", *notes]
    return _printable("\n  ".join(lines))


def _file_notes(files: Sequence[VideoFile], classes: Sequence[str]) -> list[str]:
    missing, notes = [], []
    entries: dict[object, list[VideoFile]] = defaultdict(list)
    for file in files:
        identity = _identity(file.path)
        if identity is None:
            missing.append(file.path)
        else:
            entries[identity].append(file)
    if missing:
        notes.append(
            f"{count(len(missing), 'video')} of {len(files):,} {'do' if len(missing) > 1 else 'does'} not exist "
            f"({some(missing, 1)})"
        )
    repeated = [same for same in entries.values() if len(same) > 1]
    if repeated:
        notes.append(
            f"{count(len(repeated), 'video')} {are(len(repeated))} listed more than once "
            f"({some([same[0].path for same in repeated], 1)})"
        )
    disputed = [same for same in repeated if len({file.label for file in same}) > 1]
    if disputed:
        labels = sorted({"none" if file.label is None else classes[file.label] for file in disputed[0]})
        notes.append(
            f"{count(len(disputed), 'video')} {are(len(disputed))} listed with different classes "
            f"({disputed[0][0].path}: {', '.join(labels)})"
        )
    return notes


def _identity(path: Path | ShardMember) -> object | None:
    """What two entries of the same file share; None for a file that does not exist."""
    if isinstance(path, ShardMember):
        return path
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else path


def _is_utf8(text: str) -> bool:
    return _printable(text) == text


def _printable(text: str) -> str:
    """Text with the bytes of file names that are not UTF-8 as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


# --- what a recipe trains on ----------------------------------------------------------------------------------------


def list_train_and_validation(
    data: DataConfig, seed: int, report: Report | None = None
) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    """What a recipe trains on, what it validates on, and the names of the classes.

    Validation takes the videos of `validation_root`, with labels among the training classes; or
    `num_validation_videos` of the official test list where `ucf101_split` is given, classes in turn; or else as many,
    but at most a fifth, held out from `root`. `report` is called with a summary of each data set.

    Raises what `list_videos`, `ucf101_split` and `split_validation` raise, and `UserError` if none of the videos
    exists.
    """
    validation = None
    if data.ucf101_split is not None:
        files, validation, classes = _list_ucf101(data, report)
        if data.num_validation_videos < len(validation):
            _, validation = split_validation(validation, data.num_validation_videos, seed)
    else:
        files, classes = _list_existing(data.root, report)
    if data.validation_root is not None:
        validation, names = _list_existing(data.validation_root, report)
        label_of = {name: label for label, name in enumerate(classes)}
        validation = [VideoFile(path, None if i is None else label_of.get(names[i])) for path, i in validation]
    elif validation is None:
        files, validation = split_validation(files, min(data.num_validation_videos, len(files) // 5), seed)
    return files, validation, classes


def list_training_videos(data: DataConfig, report: Report | None = None) -> tuple[list[VideoFile], list[str]]:
    """All a recipe may train on, with nothing held out: `root`, or the train list of its `ucf101_split`.

    Raises what `list_videos` and `ucf101_split` raise, and `UserError` if none of the videos exists.
    """
    if data.ucf101_split is None:
        return _list_existing(data.root, report)
    files, _, classes = _list_ucf101(data, report)
    return files, classes


def _list_existing(root: str, report: Report | None) -> tuple[list[VideoFile], list[str]]:
    files, classes = list_videos(root, report)
    if all(_identity(file.path) is None for file in files):
        hint = "; paths in a CSV are relative to its folder" if Path(root).suffix.lower() in TABLE_SUFFIXES else ""
        raise UserError(f"{root}: none of its videos exists, the first would be {files[0].path}{hint}")
    return files, classes


def _list_ucf101(data: DataConfig, report: Report | None) -> tuple[list[VideoFile], list[VideoFile], list[str]]:
    from .ucf101 import ucf101_split

    train, test, classes = ucf101_split(data.root, data.ucf101_split, data.split_files)
    if report is not None:
        for part, files in (("train", train), ("test", test)):
            report(summarize(f"{data.root}, {part} list {data.ucf101_split}", files, classes))
    return train, test, classes


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
