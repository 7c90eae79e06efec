"""User-facing errors, signals and exit codes of programs."""

from __future__ import annotations

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
    """Run a program's `main`, and leave the process group that it may have joined.

    A `UserError` becomes one line on stderr and exit code 2, without a traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # print file names that are not UTF-8, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        _leave_process_group()
    except UserError as error:
        _exit(f"error: {error}", code=2)
    except TrainingInterrupted as stop:
        _leave_process_group()
        _exit(str(stop), code=stop.code)
    except KeyboardInterrupt:
        _exit("interrupted", code=130)


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
