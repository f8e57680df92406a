"""The time that a command may take, and its division among the parts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deadline:
    """A point in time after which nothing may start."""

    seconds: float
    """From now on."""
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begun", self.clock())

    def left(self, reserve: float = 0.0) -> float:
        """Return the seconds that are left, without `reserve` seconds at the end; never below 0."""
        return max(0.0, self.begun + self.seconds - reserve - self.clock())

    def part(self, share: float, reserve: float = 0.0) -> float:
        """Return the seconds for a part that may take a share of the whole time. Time that earlier parts did
        not use is left for later ones."""
        return min(share * self.seconds, self.left(reserve))
