"""Checkpoints of a run: complete or absent, found again, and kept to a limit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..errors import UserError

PATTERN = re.compile(r"checkpoint-(\d+)$")


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoint folders of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if PATTERN.match(p.name) and p.is_dir()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The optimizer step a checkpoint was written after."""
    return int(PATTERN.match(path.name)[1])


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, total_limit: int | None) -> Path:
    """Everything registered with the accelerator in OUTPUT_DIR/checkpoint-{step}, written aside and renamed."""
    final = Path(output_dir) / f"checkpoint-{step}"
    aside = Path(output_dir) / f".unfinished-checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        if total_limit is not None:
            for old in list_checkpoints(output_dir)[: -max(total_limit, 1)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: str | Path, resume: str | None) -> Path | None:
    """The folder `train.resume_from_checkpoint` means: None, "latest" (None if the run has none yet), or a path.

    Raises:
        UserError: if the path is not a checkpoint folder.
    """
    if resume is None:
        return None
    if resume == "latest":
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    path = Path(resume)
    if not path.is_dir() or not PATTERN.match(path.name):
        raise UserError(
            f"No checkpoint at {resume}; train.resume_from_checkpoint wants 'latest' or a folder named "
            "checkpoint-STEP that a run of this program wrote."
        )
    return path
