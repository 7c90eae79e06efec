"""User-facing errors: programs print one sentence and exit with a non-zero code; and the signals that end them."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""


class TrainingInterrupted(Exception):
    """The program was asked to end by a signal, and did so in good order; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


@contextmanager
def handle_signals(handler: object, numbers: Sequence[int]) -> Iterator[None]:
    """Handle signals by `handler` within the block, unless they are ignored, as SIGINT is under `nohup ... &`.

    In another thread than the main one, where Python receives no signals, it changes nothing.
    """
    former = {}
    if threading.current_thread() is threading.main_thread():
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        former = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, handler_before in former.items():
            signal.signal(number, handler_before)


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`, and leave the process group it may have joined.

    A `UserError` becomes one line on stderr and exit code 2, without a traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # print file names that are not UTF-8, as stderr does
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        _leave_process_group()
    except UserError as error:
        sys.exit(_say(f"error: {error}", code=2))
    except TrainingInterrupted as stop:
        _leave_process_group()
        sys.exit(_say(str(stop), code=stop.code))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", code=130))


def _leave_process_group() -> None:
    """At the end of all processes' work.

    Gloo's threads let go of the last tensors a moment after their work is done, which takes Python's lock; its
    destructor waits for them holding it. So they get that moment first, or a run in a few hundred would never end.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        time.sleep(0.5)
        distributed.destroy_process_group()


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
