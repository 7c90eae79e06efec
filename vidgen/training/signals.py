"""Graceful shutdown on SIGTERM and SIGINT (Ctrl-C)."""

from __future__ import annotations

import signal
from contextlib import AbstractContextManager
from types import FrameType

from ..common.errors import handle_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Notes the first SIGTERM or SIGINT in `signal`, for the training loop to read between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def listen(self) -> AbstractContextManager[None]:
        """Handle signals within a `with` block, as `handle_signals` does; a second one ends the program at once."""
        return handle_signals(self._note, SIGNALS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def outlive_first_signal(worker: int) -> None:
    """Let a data loading worker ignore the first SIGTERM or SIGINT and end at the second; a `worker_init_fn`.

    Launchers and terminals signal all processes of a run, and the step in progress may still need a worker's data.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
