"""Whether what helps on one task helps on another: rank correlations between tasks, with intervals.

The interval is that of Fisher's z with the variance (1 + ρ²/2) / (n − 3) (Bonett & Wright 2000, "Sample size
requirements for estimating Pearson, Kendall and Spearman correlations", Psychometrika 65(1)). It was chosen
by simulation: how often, in per cent, it contains the ρ of n pairs of normal variables with the correlation r
(3,000 repeats; 400 of the bootstraps over pairs, with 999 resamples each).

| n | r | z (taken) | percentile | BCa |
|---|---|---|---|---|
| 5 | 0 / 0.5 / 0.9 | 98 / 94 / 74 | 89 / 93 / 76 | 93 / 94 / 76 |
| 8 | 0 / 0.5 / 0.9 | 96 / 97 / 97 | 94 / 97 / 97 | 95 / 98 / 97 |
| 12 | 0 / 0.5 / 0.9 | 96 / 96 / 96 | 95 / 95 / 98 | 96 / 95 / 96 |
| 20 | 0 / 0.5 / 0.9 | 96 / 97 / 96 | 96 / 96 / 98 | 97 / 96 / 95 |

So a bootstrap gains nothing here, and five pairs have no interval.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bench.report.data.groups import split
from bench.report.data.intervals import NORMAL
from bench.report.sections.modifications.data import ACCURACY, PAGE, SHOWN, scores_of
from bench.report.sections.modifications.names import DEFAULT

LEAST = 3
"""Modifications of a correlation; of fewer none is given."""
LEAST_FOR_INTERVAL = 6


def spearman(first: pd.Series[float], second: pd.Series[float]) -> tuple[float, int]:
    """Spearman's ρ over what both have, and its number; NaN for fewer than `LEAST`, and where all are equal
    in one."""
    both = pd.concat([first, second], axis=1).dropna().to_numpy(dtype=float)
    if len(both) < LEAST or (both == both[0]).all(axis=0).any():
        return math.nan, len(both)
    return float(stats.spearmanr(both[:, 0], both[:, 1]).statistic), len(both)


def interval(rho: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a rank correlation of so many pairs; NaN for fewer than `LEAST_FOR_INTERVAL`."""
    if math.isnan(rho) or count < LEAST_FOR_INTERVAL:
        return math.nan, math.nan
    if abs(rho) >= 1:  # the variance of z is not known there: one pair of neighbours exchanged is
        rho = math.copysign(1 - 12 / (count**3 - count), rho)
    middle, reach = math.atanh(rho), NORMAL * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return math.tanh(middle - reach), math.tanh(middle + reach)


def transfers(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a pair of tasks of one machine with `LEAST` modifications in common, then one a task.

    Columns: `machine`, `first` and `second` (names of tasks), `first_pool` and `second_pool`,
    `modifications`, `rho` with `rho_low` and `rho_high`, and `seeds`. A row with `seeds` compares a task with
    itself: its ρ is the mean over pairs of replicates, without an interval.
    """
    rows: list[dict[str, Any]] = []
    for where, own in split(cells, PAGE) if len(cells) else ():
        scores = scores_of(own)
        names = dict(zip(own["pool"], own["task"], strict=True))
        for one, other in combinations(names, 2):
            rho, count = spearman(*(scores.get(pool, pd.Series(dtype=float)) for pool in (one, other)))
            low, high = interval(rho, count)
            pools = {"first_pool": one, "second_pool": other}
            figures = {"modifications": count, "rho": rho, "rho_low": low, "rho_high": high}
            words = {"first": names[one], "second": names[other]}
            rows.append({**where, **words, **pools, **figures, "seeds": False})
        rows += [{**where, **row} for row in _between_replicates(own)]
    found = pd.DataFrame(rows)
    return found if found.empty else found[found["modifications"] >= LEAST].reset_index(drop=True)


def _between_replicates(own: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a task with several replicates: how well one of them predicts the order in another."""
    rows = []
    for pool, part in own.groupby("pool", sort=False):
        each = part[(part["modification"] != DEFAULT) & part["score"].notna()]
        table = pd.DataFrame(list(each["by_replicate"]), index=each["modification"], dtype=float)
        table = table.round(SHOWN) if (part["figure"] == ACCURACY).all() else table
        table = table.where(~each.set_index("modification")["guesses"], each["guess"].median())
        found = [spearman(table[one], table[other]) for one, other in combinations(table.columns, 2)]
        known = [(rho, count) for rho, count in found if not math.isnan(rho)]
        if known:
            task = part["task"].iloc[0]
            rows.append(
                {
                    "first": task,
                    "second": task,
                    "first_pool": pool,
                    "second_pool": pool,
                    "modifications": min(count for _, count in known),
                    "rho": float(np.mean([rho for rho, _ in known])),
                    "rho_low": math.nan,
                    "rho_high": math.nan,
                    "seeds": True,
                }
            )
    return rows
