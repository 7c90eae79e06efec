"""Detectors as options of a command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import UserError
from .detectors import DETECTORS, Detector, get_detector, refuse_duplicates


def parse_detectors(arguments: Sequence[str], default: str, sha256: str | None = None) -> list[Detector]:
    """Return the detectors of a command line, each given as NAME, NAME=FILE, or the FILE of the detector `default`.

    Args:
        sha256: hash of the one FILE; without a FILE, of the weights of the one detector that has some.

    Raises:
        UserError: for a repeated detector, for a hash of several files, or what `get_detector` raises.
    """
    chosen = [_parse_detector(argument, default) for argument in arguments]
    refuse_duplicates([name for name, _ in chosen])
    files = [name for name, path in chosen if path]
    files = files or [name for name, _ in chosen if name in DETECTORS and DETECTORS[name].weights]
    if sha256 is not None and len(files) != 1:
        raise UserError(
            f"--detector-sha256 is of one file, but {len(files)} of these detectors have one: pass one --detector "
            "with a file."
        )
    return [get_detector(name, path, sha256 if name in files else None) for name, path in chosen]


def _parse_detector(argument: str, default: str) -> tuple[str, str | None]:
    """Split an argument into a name and a file, or None."""
    name, equals, path = argument.partition("=")
    if equals and name in DETECTORS:  # otherwise the = is part of a path
        return name, path or None
    return (default, argument) if Path(argument).suffix or os.sep in argument else (argument, None)
