"""What this machine's noise lets one say, by the same cell measured twice.

An A/A pair is twin 0 and twin 1 of one cell and replicate: the same work in two processes of one
round. Whatever sets them apart is noise, and so is what sets two variants apart by no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.report.groups import CELL, TRAINING
from bench.report.intervals import LEVEL, Floats, differs, floor_for, interval, student

FIGURE = "step_seconds_median"
SAME = [*CELL, *TRAINING, "measure", "code_sha256"]
"""What the twins of a pair share, beside their replicate."""
ENOUGH = 19
"""Pairs from which on their 95th percentile lies among them: a new pair exceeds the largest of k in one of
k + 1 cases."""
FOUND = 0.95
"""The share of repeats in which a slowdown must be found to count as one that can be found."""
REPEATS, SEED = 4000, 0
SUGGESTED = 5
"""Replicates for which the report says what they would find, beside those that there are."""


def pairs(every: pd.DataFrame) -> pd.DataFrame:
    """One row an A/A pair: the keys of `SAME`, `replicate`, `log_ratio`, `contaminated`.

    The ratio is twin 1's step time over twin 0's; contaminated is a pair of which either is. `every` has
    the records of both twins.
    """
    ok = every[(every["status"] == "ok") & (every[FIGURE] > 0)]
    found = ok.groupby([*SAME, "replicate", "twin"], sort=False, dropna=False)
    each = found.agg(seconds=(FIGURE, "median"), contaminated=("contaminated", "count")).reset_index()
    first, second = (each[each["twin"] == twin].drop(columns="twin") for twin in (0, 1))
    both = first.merge(second, on=[*SAME, "replicate"], suffixes=("", "_again"))
    return both[[*SAME, "replicate"]].assign(
        log_ratio=np.log(both["seconds_again"] / both["seconds"]),
        contaminated=both["contaminated"] + both["contaminated_again"] > 0,
    )


def floor_of(log_ratios: Floats) -> float:
    """The |log ratio| that a new A/A pair exceeds in 5 % of cases; NaN without pairs.

    Of `ENOUGH` pairs or more their 95th percentile, placed so that this holds whatever the distribution
    is (Weibull's positions). Of fewer Student's bound for one more draw from a normal distribution about 0,
    whose deviation they estimate.
    """
    sizes = np.abs(log_ratios)
    if not sizes.size:
        return float("nan")
    if sizes.size >= ENOUGH:
        return float(np.quantile(sizes, LEVEL, method="weibull"))
    return student(sizes.size) * float(np.sqrt(np.mean(sizes**2)))


def floors(found: pd.DataFrame) -> dict[str, float]:
    """Machine → its noise floor, a |log ratio|; takes `pairs`."""
    return {str(name): floor_of(own.to_numpy()) for name, own in found.groupby("machine")["log_ratio"]}


def called_different(found: pd.DataFrame) -> Floats:
    """Of each A/A cell of a machine, over its replicates, what the report would say of twin 1 against twin 0.

    1 for different, 0 for not distinguishable, NaN where nothing says. The floor is that of the other
    cells: with its own pairs in it, a cell would take part in judging itself.
    """
    said = []
    for _, own in found.groupby(SAME, sort=False, dropna=False):
        low, high = interval(own["log_ratio"].to_numpy(dtype=float))
        others = found["log_ratio"].drop(own.index).to_numpy(dtype=float)
        said.append(differs(low, high, replicates=len(own), floor=floor_of(others)))
    return np.array(said, dtype=float)


def smallest_found(log_ratios: Floats, replicates: int, floor: float) -> float:
    """The least slowdown, as a ratio, that is found in 95 % of repeats; NaN where none ever is.

    By resampling: a repeat draws its replicates from the A/A pairs' log ratios, either twin first, and
    the slowdown shifts them all. How far each repeat must be shifted to be called different follows from
    its interval; the answer is the 95th percentile.
    """
    if not log_ratios.size or replicates < 2:
        return float("nan")
    either = np.sort(np.concatenate([log_ratios, -log_ratios]))
    draws = np.random.default_rng(SEED).choice(either, size=(REPEATS, replicates))
    low, high = interval(draws)
    shift = np.maximum(-low, floor_for(replicates, floor) - high)
    return float(np.exp(np.quantile(shift, FOUND)))


def summary(found: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """One row a machine of the cost cells; takes `pairs` and `statistics.cost_cells`.

    Columns: `machine`; `pairs` and how many of them are `contaminated`; `median` and `floor`, of |log ratio|
    as ratios; `judged` A/A cells and how many are `called` different; `replicates`, the most usual number
    that is compared with dense, with the least slowdown `found` with them, and `found_suggested` with
    `SUGGESTED`. NaN where there are no pairs.
    """
    rows: list[dict[str, Any]] = []
    for machine, cells in cost.groupby("machine", sort=True):
        own = found[found["machine"] == machine]
        logs = own["log_ratio"].to_numpy(dtype=float)
        called, floor = called_different(own), floor_of(logs)
        usual = cells["rounds"][cells["rounds"] > 0].mode()
        replicates = int(usual.max()) if len(usual) else 0
        rows.append(
            {
                "machine": machine,
                "pairs": len(own),
                "contaminated": int(own["contaminated"].sum()),
                "median": float(np.exp(np.median(np.abs(logs)))) if logs.size else float("nan"),
                "floor": float(np.exp(floor)),
                "judged": int((~np.isnan(called)).sum()),
                "called": int(np.nansum(called)),
                "replicates": replicates,
                "found": smallest_found(logs, replicates, floor),
                "found_suggested": smallest_found(logs, SUGGESTED, floor),
            }
        )
    return pd.DataFrame(rows)
