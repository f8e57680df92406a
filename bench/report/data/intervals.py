"""Intervals over replicates; `different` has the rule by which one of them says that two cells differ.

A replicate is a process of its own and counts as one figure, the median of its samples. Everything
here is of logarithms of figures: ratios then add, and a slowdown is as far from 1 as its speed-up.

The interval was chosen by simulation: ratios of equal cells whose processes vary by 1.5 %, normally
distributed, or with the tails of Student's t of 3 degrees of freedom, or as a difference of lognormals (2,000
repeats each; the least and the most of the three, in per cent). *covers*: how often the interval contains 1.

| n | interval | covers |
|---|---|---|
| 2 | range (taken) | 47–50 |
| 2 | Student's t | 95–97 |
| 3 | Student's t (taken) | 95–97 |
| 3 | bootstrap of the median, percentile | 74–75 |
| 3 | bootstrap of the mean, BCa | 69–73 |
| 5 | Student's t (taken) | 96–98 |
| 5 | bootstrap of the median, percentile | 93–95 |
| 5 | bootstrap of the mean, BCa | 79–85 |
| 12 | Student's t (taken) | 95–97 |
| 12 | bootstrap of the median, percentile | 93–94 |
| 12 | bootstrap of the mean, BCa | 83–91 |

So no bootstrap is used: for so few replicates it covers too little, and up to five a bootstrap of the median
is their range at most, which covers 1 − 2 ∙ 0.5ⁿ. For two replicates Student's t interval is some ten times
as wide as their range, so the range is used and the noise floor decides.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Floats = npt.NDArray[np.float64]

LEVEL = 0.95


@cache
def student(freedom: int) -> float:
    """Standard errors from the middle of an interval of `LEVEL` to its ends."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def interval(logs: Floats) -> tuple[Floats, Floats]:
    """Both ends of the interval over n replicates, which lie along the last axis.

    Of one NaN: it has no spread. Of two their range, which covers less than `LEVEL`. Of more Student's t
    interval of the mean logarithm, that is, of the geometric mean; up to six the median lies in it too.
    """
    n = logs.shape[-1]
    if n < 2:
        nothing = np.full(logs.shape[:-1], np.nan)
        return nothing, nothing
    if n == 2:
        return logs.min(axis=-1), logs.max(axis=-1)
    middle = logs.mean(axis=-1)
    reach = student(n - 1) * stats.sem(logs, axis=-1)
    return middle - reach, middle + reach


def of_mean(mean: Floats, deviation: Floats, counts: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Both ends of the interval of each mean over `counts` replicates, from their standard deviation, as
    `interval` has them: NaN for one replicate, of two their range."""
    n = np.asarray(counts, dtype=float)
    wide = np.where(n == 2, 1.0, stats.t.ppf((1 + LEVEL) / 2, np.maximum(n - 1, 1)))
    reach = wide * deviation / np.sqrt(n)
    return mean - reach, mean + reach


def of_share(mean: Floats, deviation: Floats, counts: npt.ArrayLike) -> tuple[Floats, Floats]:
    """The same of a share, such as an accuracy, which is from 0 to 1."""
    low, high = of_mean(mean, deviation, counts)
    return np.maximum(low, 0.0), np.minimum(high, 1.0)


def floor_for(replicates: npt.ArrayLike, floor: npt.ArrayLike) -> Floats:
    """The noise floor of the mean of `replicates`, from that of one pair: NaN where it is not known.

    Noise averages out: for n ≥ 3 the floor is the pair's over √n. Without this, more replicates would find
    fewer differences, because their narrow interval would lie within a floor that does not apply to them. For
    two, whose interval is only their range, it is the pair's.
    """
    n = np.asarray(replicates, dtype=float)
    return np.asarray(floor) / np.where(n > 2, np.sqrt(np.maximum(n, 1)), 1.0)


def by_cell(values: pd.Series[float], cell: list[str]) -> pd.DataFrame:
    """The interval of each cell's figures, one a replicate: columns `low` and `high`, and `count`.

    `values` are positive and have an index with the levels `cell`.
    """
    values = values[values > 0]
    groups = values.groupby(level=cell, sort=False, dropna=False)
    each = pd.DataFrame({"low": np.nan, "high": np.nan, "count": groups.size()})
    number = groups.ngroup().to_numpy()
    order = np.argsort(number, kind="stable")
    figures = values.to_numpy(dtype=float)[order]
    counts = each["count"].to_numpy()
    ends = each[["low", "high"]].to_numpy(copy=True)
    starts = np.cumsum(counts) - counts
    for n in np.unique(counts):  # cells of as many replicates together, for there may be thousands
        those = np.flatnonzero(counts == n)
        own = figures[starts[those, None] + np.arange(n)]
        # Of ratios to the first, so that equal figures come back to the last digit.
        low, high = interval(np.log(own / own[:, :1]))
        ends[those] = np.exp(np.column_stack([low, high])) * own[:, :1]
    return each.assign(low=ends[:, 0], high=ends[:, 1])
