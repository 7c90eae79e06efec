"""Summarize a data set in a few lines, which programs print before they train."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from .types import ShardMember, VideoFile

SHOWN_CLASSES = 5


def summarize(name: str, files: Sequence[VideoFile], classes: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The number of videos and classes, the first class names, and a line for each note.

    Every file is looked up (not opened), to note those that are missing or listed more than once.
    """
    videos = f"{len(files):,} video{'s' if len(files) != 1 else ''}"
    names = list_names(classes, SHOWN_CLASSES)
    labels = f"{len(classes):,} class{'es' if len(classes) != 1 else ''} ({names})" if classes else "no classes"
    return to_printable("\n  ".join([f"{name}: {videos}, {labels}", *notes, *_note_file_problems(files, classes)]))


def format_note(
    label: str, examples: Collection[object], *, count: int | None = None, total: int | None = None, shown: int = 3
) -> list[str]:
    """A note of a summary, "LABEL: COUNT of TOTAL (EXAMPLES)", in a list; an empty list if the count is 0.

    `count`: by default the number of examples. `shown`: how many of these are named.
    """
    count = len(examples) if count is None else count
    if not count:
        return []
    amount = f"{count:,}" if total is None else f"{count:,} of {total:,}"
    return [f"{label}: {amount}" + (f" ({list_names(examples, shown)})" if examples else "")]


def list_names(names: Collection[object], shown: int = 3) -> str:
    """The first names, separated by commas, with an ellipsis where there are more."""
    return ", ".join([*map(str, list(names)[:shown]), *(["..."] if len(names) > shown else [])])


def to_printable(text: str) -> str:
    """Text with question marks for the bytes of file names that are not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def identify_file(path: Path | ShardMember) -> object | None:
    """An identifier that two paths of the same file share; None for a file that does not exist."""
    if isinstance(path, ShardMember):
        return path
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else path


def _note_file_problems(files: Sequence[VideoFile], classes: Sequence[str]) -> list[str]:
    missing = []
    entries: dict[object, list[VideoFile]] = defaultdict(list)
    for file in files:
        identity = identify_file(file.path)
        if identity is None:
            missing.append(file.path)
        else:
            entries[identity].append(file)
    repeated = [same for same in entries.values() if len(same) > 1]
    disputed = []
    for same in repeated:
        labels = {"none" if file.label is None else classes[file.label] for file in same}
        if len(labels) > 1:
            disputed.append(f"{same[0].path}: {', '.join(sorted(labels))}")
    return [
        *format_note("missing videos", missing, total=len(files), shown=1),
        *format_note("videos listed more than once", [same[0].path for same in repeated], shown=1),
        *format_note("videos listed with different classes", disputed, shown=1),
    ]
