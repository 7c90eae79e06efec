"""Atomic file writing: files and folders appear complete or not at all."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

_UMASK = os.umask(0)  # can only be read by setting it
os.umask(_UMASK)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with the same suffix; it is renamed to `path` at the end of the block.

    Parent folders are created. If the block raises, `path` is unchanged and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        yield unfinished
        make_readable([unfinished])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder path beside `folder`; it replaces `folder` at the end of the block.

    The former folder is renamed before it is deleted, so a process that is killed leaves no part of it behind. If the
    block raises or is interrupted, `folder` is unchanged.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}{end}") for end in ("", ".replaced"))
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield unfinished
        make_readable(unfinished.rglob("*"))
        if folder.is_dir():
            folder.rename(replaced)
        unfinished.rename(folder)
    finally:
        if replaced.is_dir() and not folder.exists():  # interrupted between the two
            replaced.rename(folder)
        for leftover in (unfinished, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def make_readable(paths: Iterable[Path]) -> None:
    """Give safetensors files the permissions of any new file: safetensors 0.8 makes them unreadable for other users.

    See https://github.com/safetensors/safetensors/issues/782.
    """
    for path in paths:
        if path.suffix == ".safetensors":
            path.chmod(0o666 & ~_UMASK)


def refuse_to_replace(folder: Path, ours: re.Pattern[str]) -> None:
    """Raise `UserError` unless `folder` is missing, empty, or holds only files whose names match `ours`."""
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if not ours.fullmatch(entry.name))
        if others:
            raise UserError(f"{folder}: the folder holds other things ({others[0]}); name a new or empty one")
    elif folder.exists():
        raise UserError(f"{folder} is a file; name a new or empty one")


def file_url(path: str | os.PathLike) -> str:
    """The path as a URL for FFmpeg, which takes `12:30.mp4` without a prefix for the address of a protocol `12`."""
    return f"file:{os.fspath(path)}"
