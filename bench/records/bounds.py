"""The allowed range of each figure. A number outside its range is a bug of the program that wrote it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

MAX_INT = 2**63 - 1
"""The largest signed 64-bit integer: the limit of torch, Parquet and file systems."""
MIN_FIGURE, MAX_FIGURE = 1e-100, 1e100
"""No figure is outside this range, and products and ratios of figures within it are finite floats."""
FLOAT = sys.float_info.max
ROUNDING = 1e-6
"""Amount by which a float may exceed a bound through rounding:
a share near 1 summed in float32, a loss near 0."""


@dataclass(frozen=True)
class Bounds:
    """Minimum and maximum of a number."""

    minimum: float = -MAX_FIGURE
    maximum: float = MAX_FIGURE

    def hold(self, value: float) -> bool:
        """Return whether the number is finite and within the bounds; integers are compared exactly."""
        slack = ROUNDING if self.minimum <= 0 and type(value) is not int else 0
        return self.minimum - slack <= value <= self.maximum + slack

    def __str__(self) -> str:
        return f"{_shown(self.minimum)} to {_shown(self.maximum)}"


def _shown(value: float) -> str:
    return "2⁶³ − 1" if value == MAX_INT else f"{value:g}"
