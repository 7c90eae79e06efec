"""Mistakes a user can mend: programs print their one sentence and leave with a non-zero exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""


class Stopped(Exception):
    """The program was asked to end by a signal, and did so in good order; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


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
    except Stopped as stop:
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
