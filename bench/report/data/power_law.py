"""Exponents of power laws, fitted to costs at several sizes.

An exponent is the slope of log cost against log size, by least squares. Terms that do not grow with the
size, or grow more slowly than attention, bend the line at small sizes; so only the largest sizes are fitted,
and their range is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bench.report.data.intervals import student

SPAN = 8
"""The sizes fitted lie within this factor of the largest, if they are `FEWEST` or more."""
FEWEST = 3
"""Points of a line whose slope has an interval."""
TOLERANCE = 0.1
"""An exponent contradicts a claim where its interval is further from it than this. A log T that claims leave
out is worth 1 / ln T, some 0.1 at these lengths; a stride rounded to a power of two, about as much."""


@dataclass(frozen=True)
class Fit:
    """A slope in logarithms with its 95 % interval, and the points and range that it was taken over."""

    exponent: float
    low: float
    high: float
    points: int
    first: float
    last: float


def fit(sizes: Sequence[float], costs: Sequence[float]) -> Fit | None:
    """The exponent of the costs in the sizes, over the largest of these; None for fewer than `FEWEST`."""
    known = sorted((s, c) for s, c in zip(sizes, costs, strict=True) if c > 0)
    if len({size for size, _ in known}) < FEWEST:
        return None
    near = [pair for pair in known if pair[0] * SPAN >= known[-1][0]]
    taken = np.array(near if len(near) >= FEWEST else known[-FEWEST:])
    logs = np.log(taken)
    line = stats.linregress(logs[:, 0], logs[:, 1])
    error = float(line.stderr) if np.ptp(logs[:, 1]) else 0.0  # scipy gives none for constant costs
    off = student(len(taken) - 2) * error
    slope = float(line.slope)
    return Fit(slope, slope - off, slope + off, len(taken), float(taken[0, 0]), float(taken[-1, 0]))


def verdict(measured: Fit, claim: float | None) -> str:
    """'above' or 'below' where the interval excludes the claim by more than `TOLERANCE`; else ''."""
    if claim is None or np.isnan(claim):
        return ""
    if measured.low > claim + TOLERANCE:
        return "above"
    return "below" if measured.high < claim - TOLERANCE else ""
