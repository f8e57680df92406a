"""Intervals over replicates, and when one of them says that two cells differ.

A replicate is a process of its own and counts as one figure, the median of its samples. Everything
here is of logarithms of figures: ratios then add, and a slowdown is as far from 1 as its speed-up.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
FEW = 5
"""Up to so many replicates, a bootstrap of the median gives their range at most: too little."""
RESAMPLES = 2000
SEED = 0


def interval(logs: Floats) -> tuple[Floats, Floats]:
    """Both ends of the interval over n replicates, which lie along the last axis.

    - n = 1: NaN; one figure has no spread.
    - n = 2: their range. The middle of what they are drawn from lies in it half of the time.
    - n = 3 to `FEW`: Student's t interval of the mean logarithm, that is, of the geometric mean. The
      median lies in it too: it is less than a standard deviation from the mean.
    - more: the percentile bootstrap of the median, with a fixed seed.
    """
    n = logs.shape[-1]
    if n < 2:
        nothing = np.full(logs.shape[:-1], np.nan)
        return nothing, nothing
    if n == 2:
        return logs.min(axis=-1), logs.max(axis=-1)
    if n <= FEW:
        middle = logs.mean(axis=-1)
        reach = stats.t.ppf((1 + LEVEL) / 2, n - 1) * stats.sem(logs, axis=-1)
        return middle - reach, middle + reach
    found = stats.bootstrap(
        (logs,),
        np.median,
        axis=-1,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        batch=max(1, 4_000_000 // logs.size),
        random_state=np.random.default_rng(SEED),
    ).confidence_interval
    return found.low, found.high


def differs(low: Floats, high: Floats, *, replicates: npt.ArrayLike, floor: npt.ArrayLike) -> Floats:
    """Whether intervals of log ratios tell two cells apart: 1 for yes, 0 for no, NaN where nothing says.

    They do where the interval neither holds 0, which is a ratio of 1, nor lies within ± `floor`, the
    machine's noise (`noise.floor_of`; NaN where it is not known). Of one replicate nothing says. Nor of
    two where the floor is not known: half of all equal cells have both ratios on one side of 1.
    """
    known = ~np.isnan(floor)
    least = np.where(known, floor, 0.0)
    apart = (low > 0) & (high > least) | (high < 0) & (low < -least)
    enough = (np.asarray(replicates) > 2) | ((np.asarray(replicates) == 2) & known)
    return np.where(enough & ~np.isnan(low), apart, np.nan)


def by_cell(values: pd.Series[float], cell: list[str]) -> pd.DataFrame:
    """The interval of each cell's figures, one a replicate: columns `low` and `high`, and `count`.

    `values` are positive and have an index with the levels `cell`.
    """
    known = values[values > 0]
    ends = {
        key: (*map(float, np.exp(interval(np.log(own.to_numpy(dtype=float))))), len(own))
        for key, own in known.groupby(level=cell, sort=False, dropna=False)
    }
    index = pd.MultiIndex.from_tuples(ends, names=cell)
    return pd.DataFrame(list(ends.values()), index=index, columns=["low", "high", "count"])
