"""The page's charts as data: the plots' own curves and axes, with ticks in human units at every zoom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.report.text import units

Json = dict[str, Any]

_BINARY = ((2.0, (1.0, 1.25, 1.5, 1.75)), (2.0, (1.0,)), (4.0, (1.0,)), (16.0, (1.0,)), (64.0, (1.0,)))
_DECIMAL = (
    (10.0, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)),
    (10.0, (1.0, 2.0, 5.0)),
    (10.0, (1.0, 3.0)),
    (10.0, (1.0,)),
)
"""From the finest ticks to the coarsest: a base, and the multiples of its powers."""


def number(value: Any) -> float | int | None:
    """A figure for JSON: six significant digits, None where it was not taken."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def numbers(values: pd.Series[Any]) -> list[float | int | None]:
    """A column of figures for JSON."""
    return [number(value) for value in values.to_numpy(dtype=float, na_value=np.nan)]


def ticks(
    low: float, high: float, show: Callable[[float], str], *, binary: bool
) -> list[list[tuple[float, str]]]:
    labels = []
    for base, multiples in _BINARY if binary else _DECIMAL:
        powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
        places = [multiple * base**power for power in powers for multiple in multiples]
        labels.append([(number(v) or 0.0, show(v)) for v in places if low / 4 <= v <= high * 4])
    return labels


def lengths(values: Sequence[int]) -> list[tuple[int, str]]:
    """The lengths, each with its short name: (4096, '4k')."""
    return [(int(value), units.length(value)) for value in sorted(set(values))]
