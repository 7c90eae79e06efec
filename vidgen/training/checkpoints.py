"""Checkpoints of a run: complete or absent, found again, and kept to a limit.

A checkpoint is written into a hidden folder, forced to the disk, and renamed; one that makes room is renamed before it
is deleted. So whatever is called checkpoint-STEP is whole, also after a kill at any moment.
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

PATTERN = re.compile(r"checkpoint-(\d+)$")
UNFINISHED, REPLACED, DELETED = ".unfinished-", ".replaced-", ".deleted-"  # before a checkpoint's name


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoint folders of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if PATTERN.match(p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(PATTERN.match(path.name)[1])


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    total_limit: int | None,
    write: Callable[[Path], None],
) -> Path:
    """Write OUTPUT_DIR/checkpoint-{step} on all processes, and delete later ones and what is over the limit.

    Args:
        write: called on every process with the folder to write into.

    Raises:
        UserError: if it cannot be written (a full disk); earlier checkpoints are as they were.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    aside, replaced = (final.with_name(prefix + final.name) for prefix in (UNFINISHED, REPLACED))
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        write(aside)
        accelerator.wait_for_everyone()  # until then other processes still rename temporary files in there
        _sync_files(aside)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for later in list_checkpoints(output_dir):  # of a run that was resumed from before them
                if checkpoint_step(later) > step:
                    _delete(later)
            if final.exists():  # likewise
                final.rename(replaced)
            aside.rename(final)
            _sync_folder(final.parent)
            _delete(replaced)
            for old in list_checkpoints(output_dir)[: -max(total_limit, 1)] if total_limit is not None else ():
                _delete(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        kept = [path.name for path in list_checkpoints(output_dir)]
        raise UserError(
            f"The checkpoint of step {step} cannot be written in {output_dir} "
            f"({next(iter(str(error).splitlines()), type(error).__name__)}); "
            + (f"{kept[-1]} is whole" if kept else "there is none before it")
            + ". Make room if the disk is full, and go on with resume=latest."
        ) from error
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The folder that `resume` means: None, "latest" (None if the run has none yet), or a path.

    Raises:
        UserError: if the path is not a checkpoint folder, or the run would mix its checkpoints with another run's.
    """
    checkpoints = list_checkpoints(output_dir)
    if resume == "latest":
        return checkpoints[-1] if checkpoints else None
    path = Path(resume) if resume is not None else None
    if checkpoints and (path is None or path.resolve().parent != Path(output_dir).resolve()):
        raise UserError(
            f"{output_dir} holds {checkpoints[-1].name} of an earlier run: go on with it by resume=latest, name "
            "another output_dir, or delete the folder."
        )
    if path is None:
        return None
    if not path.is_dir() or not PATTERN.match(path.name):
        raise UserError(
            f"No checkpoint at {resume}; resume wants 'latest' or a folder named checkpoint-STEP that a run of this "
            "program wrote."
        )
    return path


def clear_remains(output_dir: str | Path) -> None:
    """Remove what a killed run left half-written, and bring back what it was about to replace."""
    for path in Path(output_dir).glob(f"{REPLACED}checkpoint-*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)
    for prefix in (UNFINISHED, REPLACED, DELETED):
        for path in Path(output_dir).glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(path, ignore_errors=True)


def _delete(folder: Path) -> None:
    if folder.exists():
        doomed = folder.with_name(DELETED + PATTERN.search(folder.name)[0])
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _sync_files(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
