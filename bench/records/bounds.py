"""Which numbers a figure can be. Anything else is a mistake of the program that wrote it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

WHOLE = 2**63 - 1
"""The largest whole number of 64 bits and a sign, as torch, Parquet and file systems have them."""
LEAST, MOST = 1e-100, 1e100
"""Beyond any figure, and so far from the ends of a float that products and ratios of figures are finite."""
FLOAT = sys.float_info.max
ROUNDING = 1e-6
"""By which a float may pass a bound: a share of 1 that was summed in float32, a loss of 0."""


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a number may be."""

    least: float = -MOST
    most: float = MOST

    def hold(self, value: float) -> bool:
        """Whether the number is finite and within the bounds; whole numbers are compared exactly."""
        slack = ROUNDING if self.least <= 0 and type(value) is not int else 0
        return self.least - slack <= value <= self.most + slack

    def __str__(self) -> str:
        return f"{_shown(self.least)} to {_shown(self.most)}"


def _shown(value: float) -> str:
    return "2⁶³ − 1" if value == WHOLE else f"{value:g}"
