"""Progress lines of a slow preparation, on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from bench.inputs.printable import printable

QUIET_SECONDS = 2.0
"""Work that ends earlier prints nothing."""
EVERY_SECONDS = 10.0
"""Time from one line to the next."""


class SlowWork:
    """Context manager that prints how much of a work is done: nothing for the first seconds, then a line from
    time to time, and one at the end."""

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        """`total` is the number of units in all, if it is known."""
        self.what, self.total, self.unit = printable(what), total, unit
        self.done = 0
        self.begun = time.monotonic()
        self._next = self.begun + QUIET_SECONDS
        self._spoke = False

    def __enter__(self) -> SlowWork:
        return self

    def advance(self, amount: int) -> None:
        """Count `amount` units as done."""
        self.done += amount
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_SECONDS
            share = f" ({self.done / max(1, self.total):.0%})" if self.total is not None else ""
            self._say(f"{self.done:,} {self.unit}{share}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spoke and error is None:
            self._say(f"{self.done:,} {self.unit} in {time.monotonic() - self.begun:.0f} s")

    def _say(self, text: str) -> None:
        self._spoke = True
        print(f"{self.what}: {text}", file=sys.stderr, flush=True)
