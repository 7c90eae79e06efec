"""Progress bars with rate and remaining time; in a log file a line every 15 seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from accelerate.state import PartialState
from tqdm import tqdm

LOG_SECONDS = 15.0


def progress(over: Iterable[Any] | None = None, description: str = "", **options: Any) -> tqdm:
    """A tqdm bar over an iterable, or with `total=` one to update by hand; shown on the main process only."""
    terminal = sys.stderr.isatty()
    return tqdm(
        over,
        desc=description,
        disable=not PartialState().is_main_process,
        mininterval=0.2 if terminal else LOG_SECONDS,
        maxinterval=LOG_SECONDS,
        dynamic_ncols=terminal,
        file=sys.stderr if terminal else _Lines(),
        **options,
    )


class _Lines:
    """Stderr that is not a terminal: every state of a bar is a separate line."""

    def write(self, text: str) -> None:
        if text := text.replace("\r", "").strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        sys.stderr.flush()
