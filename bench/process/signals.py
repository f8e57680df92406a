"""Handling of Ctrl-C (SIGINT), SIGTERM and a closed terminal (SIGHUP): the first signal lets the current cell
end properly, and a second one ends the process immediately."""

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
"""Shows the cursor. A progress bar hides it, and cannot show it again if a second signal ends the process."""


class Stopped(KeyboardInterrupt):
    """A signal requested the end of the process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


class Interrupts:
    """Context manager in which the first of `SIGNALS` raises Stopped: immediately, or at the end of a
    `deferred` block.

    Code that waits inside a `deferred` block can watch the file descriptor `signal_fd`. Only the main thread
    receives signals; in other threads this context manager does nothing. Signals that are ignored, such as
    SIGHUP under nohup, stay ignored."""

    def __init__(self, work: str = "the current cell") -> None:
        """`work` describes, for the user, the work in a `deferred` block."""
        self.work = work

    def __enter__(self) -> Interrupts:
        self.signal_fd, self._write_fd = os.pipe()
        """A file descriptor that becomes readable when a signal arrives."""
        self._received: int | None = None
        self._deferred_blocks = 0
        self._counting = threading.Lock()
        caught = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        main = threading.current_thread() is threading.main_thread()
        self._before = {n: signal.signal(n, self._handle) for n in caught} if main else {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.signal_fd)
        os.close(self._write_fd)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager in which nothing is interrupted; Stopped is raised at its end. Several threads may
        be in such a block at the same time."""
        with self._counting:
            self._deferred_blocks += 1
        try:
            yield
        finally:
            with self._counting:
                self._deferred_blocks -= 1
        self.check()

    def check(self) -> None:
        """Raise Stopped if a signal has arrived; for threads, in which signals raise nothing."""
        if self._received is not None:
            raise Stopped(self._received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for caught in self._before:
            signal.signal(caught, signal.SIG_DFL)
        self._received = number
        os.write(self._write_fd, b".")
        if not self._deferred_blocks:
            raise Stopped(number)
        shown = f"\n{_SHOW_CURSOR}" if sys.stderr.isatty() else ""
        line = f"{shown}{signal.Signals(number).name}: ending {self.work}; a second signal stops at once\n"
        with suppress(OSError):  # the terminal may be closed
            os.write(2, line.encode())
