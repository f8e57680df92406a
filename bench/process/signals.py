"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP): what is in hand is put down first, and a second signal ends
the process on the spot."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = "\x1b[?25h"
"""A progress bar hides it, and does not get to show it again where a second signal ends the process."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class Interrupts:
    """Context manager inside which the first of `SIGNALS` raises Stopped: at once, or at the end of what is
    `held`. What waits meanwhile learns of it from `asked`. Only a process's main thread gets signals; in any
    other this does nothing, and neither to a signal that is ignored, as SIGHUP is under nohup."""

    def __init__(self, hand: str = "the cell in hand") -> None:
        """`hand`: what is held, in words."""
        self.hand = hand

    def __enter__(self) -> Interrupts:
        self.asked, self._asking = os.pipe()
        """A file descriptor from which there is something to read once a signal came."""
        self._came: int | None = None
        self._holding = False
        caught = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        main = threading.current_thread() is threading.main_thread()
        self._before = {n: signal.signal(n, self._come) for n in caught} if main else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.asked)
        os.close(self._asking)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is interrupted inside; Stopped is raised at the end."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self._came is not None:
            raise Stopped(self._came)

    def _come(self, number: int, frame: FrameType | None) -> None:
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)
        self._came = number
        os.write(self._asking, b".")
        if not self._holding:
            raise Stopped(number)
        shown = f"\n{_SHOW_CURSOR}" if sys.stderr.isatty() else ""
        line = f"{shown}{signal.Signals(number).name}: ending {self.hand}; once more stops at once\n"
        with suppress(OSError):  # the terminal may be what went
            os.write(2, line.encode())
