"""Mistakes a user can mend: programs print their one sentence and leave with a non-zero exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what would be right."""


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`; a `UserError` becomes one line on stderr and exit code 2, without a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(_say(f"error: {error}", code=2))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", code=130))


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code
