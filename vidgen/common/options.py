"""Checks of command-line options: home folders are expanded, numbers must be finite.

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
    """Replace a leading `~` or `~user` by the home folder."""
    return os.path.expanduser(os.fspath(path))


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Expand home folders in the values of options by name: texts, paths, and lists of them.

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
