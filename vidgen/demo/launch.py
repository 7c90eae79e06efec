"""Run a training program in a child process, which receives the signals of this one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..common.errors import TrainingInterrupted, UserError, handle_signals

REPOSITORY = Path(__file__).parents[2]
SECONDS_TO_STOP = 60  # for a program to write its checkpoint after a signal; then it is killed
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def launch_training(program: str, config: str, settings: Sequence[str], overrides: Sequence[str]) -> None:
    """Run `train_vae.py` or `train_dit.py` by `accelerate launch`, as a user does.

    SIGINT, SIGTERM and SIGHUP are passed on to the training, which writes a checkpoint and exits.

    Args:
        program: file name of the program in the repository.
        config: its config, relative to `configs/`.
        settings, overrides: `key=value` arguments.

    Raises:
        UserError: if the program fails, after it has printed the reason.
        TrainingInterrupted: if this process received a signal, after the training ended.
    """
    arguments = [program, "--config", f"configs/{config}", *settings, *overrides]
    print(f"$ accelerate launch {shlex.join(arguments)}", flush=True)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--quiet"]
    absolute = [REPOSITORY / program, "--config", REPOSITORY / "configs" / config, *settings, *overrides]
    if run_until_signal([*launcher, *map(str, absolute)]):
        raise UserError(f"{program} failed; its error is printed above.")


def run_until_signal(command: Sequence[str]) -> int:
    """Run a command in a new process group and return its exit code.

    A signal that asks this process to end is passed on to the whole group, so no child process survives.

    Raises:
        TrainingInterrupted: if such a signal came, once the group has ended.
    """
    with handle_signals(_raise_interrupted, SIGNALS):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            return process.wait()
        except TrainingInterrupted as interruption:
            _end_group(process, interruption.code - 128)
            raise
        except BaseException:
            _end_group(process, signal.SIGTERM)
            raise


def _end_group(process: subprocess.Popen, number: int) -> None:
    """Pass a signal on to the group of a process, and kill the processes that have not ended in time."""
    with handle_signals(signal.SIG_IGN, SIGNALS):
        deadline = time.monotonic() + SECONDS_TO_STOP
        _signal_group(process, number)
        while time.monotonic() < deadline and _signal_group(process, 0):  # the launcher ends before the training
            process.poll()
            time.sleep(0.05)
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen, number: int) -> bool:
    """Signal a process group; return whether it exists."""
    try:
        os.killpg(process.pid, number)
        return True
    except ProcessLookupError:
        return False


def _raise_interrupted(number: int, frame: FrameType | None) -> NoReturn:
    raise TrainingInterrupted(f"stopped by {signal.Signals(number).name}", number)
