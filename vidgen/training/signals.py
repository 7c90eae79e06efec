"""Being asked to stop: SIGTERM and Ctrl-C become a request that the loop looks at between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While entered, the first SIGTERM or Ctrl-C is noted in `signal`; another one ends the program at once.

    A signal that is ignored (Ctrl-C in a shell's background job) stays so. In another thread than the main one, where
    Python hears no signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self.previous = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def outlive_first_signal(worker: int) -> None:
    """What a loader's worker does at its start: it reads on after the first SIGTERM or Ctrl-C, and ends by the second.

    Launchers and terminals signal all processes of a run, and the step under way may still need what a worker reads.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_DFL))
