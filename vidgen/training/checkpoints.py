"""Checkpoints of a run: written completely or not at all, found again, and limited in number.

A checkpoint is written to a hidden folder, synchronized to the disk, and renamed; an old one is renamed before it is
deleted. So a folder named checkpoint-STEP is complete even if the run is killed at any moment.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from ..common.errors import UserError
from ..common.io import make_readable

PATTERN = re.compile(r"checkpoint-(\d+)$")
UNFINISHED, REPLACED, DELETED = ".unfinished-", ".replaced-", ".deleted-"  # prefixes of a checkpoint's name


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoint folders of a run, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if PATTERN.match(p.name) and p.is_dir()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(PATTERN.match(path.name)[1])


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int | None,
    write: Callable[[Path], None],
) -> Path:
    """Write OUTPUT_DIR/checkpoint-{step} on all processes; delete later checkpoints and the oldest over the limit.

    Args:
        write: called on every process with the folder to write to.

    Raises:
        UserError: if it cannot be written (a full disk); earlier checkpoints are unchanged.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished, replaced = (final.with_name(prefix + final.name) for prefix in (UNFINISHED, REPLACED))
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        # Write on all processes, and wait for each before and after synchronizing the files.
        write(unfinished)
        accelerator.wait_for_everyone()
        _sync_files(unfinished)
        accelerator.wait_for_everyone()

        # Put the new checkpoint in place, and delete those that a resumed run replaces or that exceed the limit.
        if accelerator.is_main_process:
            make_readable(unfinished.rglob("*"))
            for other in list_checkpoints(output_dir):
                if checkpoint_step(other) > step:
                    _delete(other)
            if final.exists():
                final.rename(replaced)
            unfinished.rename(final)
            _sync_folder(final.parent)
            _delete(replaced)
            for old in list_checkpoints(output_dir)[: -max(total_limit, 1)] if total_limit is not None else ():
                _delete(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # what the libraries raise for a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        complete = [path.name for path in list_checkpoints(output_dir)]
        raise UserError(
            f"The checkpoint of step {step} cannot be written in {output_dir} "
            f"({next(iter(str(error).splitlines()), type(error).__name__)}); "
            + (f"{complete[-1]} is complete" if complete else "there is no earlier checkpoint")
            + ". Free some space if the disk is full, and continue with resume=latest."
        ) from error
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The folder that `resume` names: None, "latest" (None if the run has none yet), or a path.

    Raises:
        UserError: if the path is no checkpoint folder, or the run would mix its checkpoints with those of another.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume == "latest":
        return checkpoints[-1] if checkpoints else None
    path = Path(resume) if resume is not None else None
    if checkpoints and (path is None or path.resolve().parent != Path(output_dir).resolve()):
        raise UserError(
            f"{output_dir} holds {checkpoints[-1].name} of an earlier run: continue it with resume=latest, choose "
            "another output_dir, or delete the folder."
        )
    if path is not None and not (path.is_dir() and PATTERN.match(path.name)):
        raise UserError(
            f"No checkpoint at {resume}; resume must be 'latest' or a folder named checkpoint-STEP that this program "
            "wrote."
        )
    return path


def clear_remains(output_dir: str | Path) -> None:
    """Remove incomplete checkpoints of a killed run, and restore one that it was about to replace."""
    for path in Path(output_dir).glob(f"{REPLACED}checkpoint-*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    for prefix in (UNFINISHED, REPLACED, DELETED):
        for path in Path(output_dir).glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def _delete(folder: Path) -> None:
    if folder.exists():
        hidden = folder.with_name(DELETED + PATTERN.search(folder.name)[0])
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _sync_files(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
