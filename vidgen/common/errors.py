"""User-facing errors, signals and exit codes of programs."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn


class UserError(ValueError):
    """A mistake in the user's input; the message says what is wrong, where, and what would be right."""


class TrainingInterrupted(Exception):
    """A signal ended the program after it saved its state; the message says how to continue."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


@contextmanager
def handle_signals(handler: object, numbers: Sequence[int]) -> Iterator[None]:
    """Handle signals with `handler` within the block, unless they are ignored, as SIGINT is under `nohup ... &`.

    Does nothing outside the main thread, where Python receives no signals.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main` in the process group of its launcher, and leave the group.

    A `UserError` becomes one line on stderr and exit code 2, without a traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # print file names that are not UTF-8, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _join_process_group()
        main()
        _leave_process_group()
    except UserError as error:
        _exit(f"error: {error}", code=2)
    except TrainingInterrupted as stop:
        _leave_process_group()
        _exit(str(stop), code=stop.code)
    except KeyboardInterrupt:
        _exit("interrupted", code=130)


def _join_process_group() -> None:
    """Connect the processes of a launcher; raise a `UserError` if Accelerate does not.

    Without an accelerator it connects them only on request. Each would do all the work, and all write the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1 or "LOCAL_RANK" not in os.environ:
        return
    from accelerate import PartialState  # slow to import
    from accelerate.utils import parse_flag_from_env

    # Without the flag, a state that is created before the `Accelerator` would not connect processes on the CPU.
    if PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).num_processes == 1:
        raise UserError(
            f"the launcher started {started} processes, but without an accelerator each would run alone; for "
            "processes on the CPU set ACCELERATE_USE_CPU=true and pass --dynamo_backend no to accelerate launch."
        )


def _leave_process_group() -> None:
    """Destroy the process group, after a pause.

    Gloo's threads need Python's lock to release the last tensors, shortly after the work is done, and Gloo's
    destructor holds that lock while it waits for them. Without the pause one run in a few hundred hangs.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        time.sleep(0.5)
        distributed.destroy_process_group()


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
