"""The noise floor of a machine, from pairs of one cell measured twice.

An A/A pair is twin 0 and twin 1 of one cell and replicate: the same work in two processes of one round. A
difference between the twins is noise; so is a difference between two variants that is no larger.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.groups import CELL, TRAINING
from bench.report.data.intervals import LEVEL, Floats, student

FIGURE = SECONDS
SAME = [*CELL, *TRAINING, "measure", "code_sha256"]
"""Keys that the twins of a pair share, besides their replicate."""
ENOUGH = 19
"""Pairs from which on their 95th percentile lies among them: a new pair exceeds the largest of k in one of
k + 1 cases."""


def pairs(every: pd.DataFrame) -> pd.DataFrame:
    """One row an A/A pair: the keys of `SAME`, `replicate`, `log_ratio`, `contaminated`.

    The ratio is twin 1's compared time over twin 0's; contaminated is a pair of which either is. `every` has
    the records of both twins.
    """
    ok = every[(every["status"] == "ok") & (every[FIGURE] > 0)]
    groups = ok.groupby([*SAME, "replicate", "twin"], sort=False, dropna=False)
    each = groups.agg(seconds=(FIGURE, "median"), contaminated=("contaminated", "count")).reset_index()
    first, second = (each[each["twin"] == twin].drop(columns="twin") for twin in (0, 1))
    both = first.merge(second, on=[*SAME, "replicate"], suffixes=("", "_again"))
    return both[[*SAME, "replicate"]].assign(
        log_ratio=np.log(both["seconds_again"] / both["seconds"]),
        contaminated=both["contaminated"] + both["contaminated_again"] > 0,
    )


def floor_of(log_ratios: Floats) -> float:
    """The |log ratio| that a new A/A pair exceeds in 5 % of cases; NaN without pairs.

    For `ENOUGH` pairs or more it is their 95th percentile at Weibull's positions, which holds for any
    distribution. For fewer it is Student's bound for one more draw from a normal distribution about 0, whose
    deviation they estimate.
    """
    sizes = np.abs(log_ratios)
    if not sizes.size:
        return float("nan")
    if sizes.size >= ENOUGH:
        return float(np.quantile(sizes, LEVEL, method="weibull"))
    return student(sizes.size) * float(np.sqrt(np.mean(sizes**2)))


def floors(twins: pd.DataFrame) -> dict[str, float]:
    """Machine → its noise floor, a |log ratio|; takes `pairs`."""
    return {str(name): floor_of(own.to_numpy()) for name, own in twins.groupby("machine")["log_ratio"]}
