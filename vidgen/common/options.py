"""What every program does with the values of its options: home folders and numbers that are not finite.

A shell expands `~` only at the beginning of a word, and not within quotes, after `=`, or in a YAML file.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from .errors import UserError

_NAMED_PATH = re.compile(r"([\w.-]+=)(~.*)", re.DOTALL)  # NAME=FILE


def expand_home(path: str | os.PathLike) -> str:
    """`path` with a leading `~` or `~user` replaced by the home folder; other paths as they are."""
    return os.path.expanduser(os.fspath(path))


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a command line, by name, with home folders expanded in texts, paths and lists of them.

    Raises `UserError` for a number that is NaN or infinite.
    """
    return {name: _check(f"--{name.replace('_', '-')}", value) for name, value in options.items()}


def _check(option: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_check(option, part) for part in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{option} must be a finite number, not {value}.")
    if isinstance(value, Path):
        return Path(expand_home(value))
    if isinstance(value, str):
        named = _NAMED_PATH.fullmatch(value)
        return named[1] + expand_home(named[2]) if named else expand_home(value)
    return value
