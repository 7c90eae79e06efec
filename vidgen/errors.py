"""Mistakes a user can mend: programs print their one sentence and leave with a non-zero exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""


class Stopped(Exception):
    """The program was asked to end by a signal, and did so in good order; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"error: {error}", code=2))
    except Stopped as stop:
        sys.exit(_say(str(stop), code=stop.code))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", code=130))


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
