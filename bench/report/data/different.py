"""When an interval of ratios says that two cells differ, in a family of many comparisons.

Two conditions must hold. *Outside the floor*: both ends of the interval lie on one side of ± the noise floor
of as many replicates, so that equal cells and differences of the size of noise are not called different. *In
the family*: a report compares dozens of cells, and one in twenty of equal cells would differ by chance. Each
comparison has a p-value, and Holm's correction (`holm`) holds the probability that a report calls any pair of
equal cells different to 5 %.

The p-value is of the mean log ratio of n replicates, if the noise of a ratio is normal and its 95th
percentile the floor; the floor is an upper bound, so the deviation that follows from it is one too. Without a
floor it is that of Student's t test over the replicates.

Simulated for n replicates and the noise of `intervals`, with the floor known (the least and the most of the
three distributions, in per cent). *called*: how often equal cells are outside the floor. *family*: how many
reports of 80 independent comparisons call any of them different. *found*: how often a cell that is slower by
10 % is called different in such a report.

| n | called | family | found |
|---|---|---|---|
| 2 | 0.1–0.2 | 2.5–10 | 97–98 |
| 3 | 0.0–0.1 | 0.1–0.9 | 85–89 |
| 5 | 0.0 | 0.0–0.8 | 98–100 |
| 12 | 0.0 | 0.0–0.8 | 100 |

With two replicates, noise with long tails and a floor that is known exactly, too many reports call a cell
different. An estimated floor is used by its upper confidence bound: with a bound of 1.15 times the floor, the
same simulation gives 0.5 to 4 per cent. Bounds from fewer than 60 pairs are usually larger than that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

from bench.report.data.holm import holm
from bench.report.data.intervals import LEVEL, Floats, floor_for, student

NORMAL = float(stats.norm.ppf((1 + LEVEL) / 2))
"""Deviations of a normal distribution that it exceeds, in size, with a probability of 1 − `LEVEL`."""


def outside(low: Floats, high: Floats, *, replicates: npt.ArrayLike, floor: npt.ArrayLike) -> Floats:
    """Whether intervals of log ratios lie outside ± `floor_for` of `replicates`: 1, 0, or NaN for undecided.

    `floor` is a pair's (NaN where it is not known; the interval must then exclude 0). One replicate decides
    nothing. Two without a known floor decide nothing either: half of all equal cells have both ratios on one
    side of 1.
    """
    known = ~np.isnan(floor)
    least = np.where(known, floor_for(replicates, floor), 0.0)
    is_outside = (low > least) | (high < -least)
    enough = (np.asarray(replicates) > 2) | ((np.asarray(replicates) == 2) & known)
    return np.where(enough & ~np.isnan(low), is_outside, np.nan)


def p_values(low: Floats, high: Floats, *, replicates: npt.ArrayLike, floor: npt.ArrayLike) -> Floats:
    """The probability of a mean log ratio of that size or larger between equal cells; NaN where `outside` is
    undecided. The mean is the middle of the interval (of two replicates, of their range)."""
    n = np.asarray(replicates, dtype=float)
    size = np.abs(low + high) / 2
    reach = (high - low) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        by_floor = 2 * stats.norm.sf(size * np.sqrt(n) * NORMAL / np.asarray(floor, dtype=float))
        quantile = np.array([student(int(m) - 1) if m > 2 else np.nan for m in n.ravel()]).reshape(n.shape)
        by_spread = 2 * stats.t.sf(size * quantile / reach, np.maximum(n - 1, 1))
    found = np.where(np.isnan(floor), by_spread, by_floor)
    found = np.where(size == 0, 1.0, found)  # equal to the last digit, whatever the noise
    return np.where(np.isnan(outside(low, high, replicates=replicates, floor=floor)), np.nan, found)


def differs(low: Floats, high: Floats, *, replicates: npt.ArrayLike, floor: npt.ArrayLike) -> Floats:
    """Whether the cells of a family differ from those that they are compared with: 1 for yes, 0 for no, NaN
    for undecided.

    One dimension, an interval of log ratios a comparison; the family are all that are decided. They differ
    where the interval is `outside` the floor and the p-value, corrected for the family, is at most 5 %.
    """
    found = outside(low, high, replicates=replicates, floor=floor)
    family = holm(p_values(low, high, replicates=replicates, floor=floor))
    return np.where(np.isnan(found), np.nan, (found == 1) & (family <= 1 - LEVEL))
