"""Where clips and results meet files: uint8 pixels, and files that appear whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipelines.finite import NonFiniteError

from .errors import UserError


def to_uint8(clip: torch.Tensor) -> torch.Tensor:
    """The pixels a file would hold: a float tensor of any shape in [-1, 1] as uint8 [0, 255], clamped and rounded.

    Raises:
        NonFiniteError: a ValueError, if a value is not finite, which no pixel can show.
    """
    if clip.numel() and not torch.stack(clip.detach().aminmax()).isfinite().all():
        raise NonFiniteError(
            f"a clip of shape {tuple(clip.shape)} holds NaN or infinite values; pixels must be finite."
        )
    return (clip.detach().float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; what is written there becomes `path` at the end.

    Folders are made as needed. If the block raises, `path` is left as it was and the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_dir(folder: str | os.PathLike) -> Iterator[Path]:
    """As `atomic_write` for a whole folder: what is written into the yielded one replaces `folder` at the end."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def refuse_to_replace(folder: Path, ours: re.Pattern[str]) -> None:
    """Raise `UserError` unless `folder` is missing, empty, or holds only files whose names are `ours`."""
    if folder.is_dir():
        others = sorted(entry.name for entry in folder.iterdir() if not ours.fullmatch(entry.name))
        if others:
            raise UserError(f"{folder}: the folder holds other things ({others[0]}); name a new or empty one")
    elif folder.exists():
        raise UserError(f"{folder}: it is a file, so no folder of that name can be written")
