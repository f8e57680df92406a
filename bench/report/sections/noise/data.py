"""Effects of a machine's noise, from the same cell measured twice; see `data.noise_floor`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.intervals import Floats, differs, floor_for, interval
from bench.report.data.noise_floor import SAME, floor_of

FOUND = 0.95
"""The share of repetitions in which a slowdown must be detected to count as detectable."""
REPEATS, SEED = 4000, 0
SUGGESTED = 5
"""A number of replicates for which the report adds the slowdown that they would find."""


def called_different(pairs: pd.DataFrame) -> Floats:
    """For each A/A cell of a machine, over its replicates: whether the report would call twin 1 different
    from twin 0.

    1 for different, 0 for not distinguishable, NaN for undecided. The floor is that of the other cells: with
    its own pairs in it, a cell would take part in judging itself.
    """
    verdicts = []
    for _, own in pairs.groupby(SAME, sort=False, dropna=False):
        low, high = interval(own["log_ratio"].to_numpy(dtype=float))
        others = pairs["log_ratio"].drop(own.index).to_numpy(dtype=float)
        verdicts.append(differs(low, high, replicates=len(own), floor=floor_of(others)))
    return np.array(verdicts, dtype=float)


def smallest_found(log_ratios: Floats, replicates: int, floor: float) -> float:
    """The smallest slowdown, as a ratio, that is detected in 95 % of repetitions; NaN if there is none.

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


def summary(pairs: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """One row a machine of the cost cells; takes `pairs` and `statistics.cost_cells`.

    Columns: `machine`; `pairs` and how many of them are `contaminated`; `median` and `floor`, of |log ratio|
    as ratios; `judged` A/A cells and how many are `called` different; `replicates`, the most usual number
    that is compared with dense, with the smallest slowdown `found` with them, and `found_suggested` with
    `SUGGESTED`. NaN where there are no pairs.
    """
    rows: list[dict[str, Any]] = []
    for machine, cells in cost.groupby("machine", sort=True):
        own = pairs[pairs["machine"] == machine]
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
