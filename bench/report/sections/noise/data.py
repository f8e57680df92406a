"""Effects of a machine's noise, from the same cell measured twice; see `data.noise_floor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bench.report.data.compared_time import SECONDS
from bench.report.data.different import NORMAL, differs
from bench.report.data.disturbed import DISTURBED, marked, takes_part
from bench.report.data.groups import CELL
from bench.report.data.intervals import LEVEL, Floats, floor_for, interval
from bench.report.data.noise_floor import Noise
from bench.report.data.sampling import HALF_WIDTH, ended_short

FOUND = 0.95
"""The share of repetitions in which a slowdown must be detected to count as detectable."""
REPEATS, SEED = 4000, 0
SUGGESTED = 5
"""A number of replicates for which the report adds the slowdown that they would find."""


def called_different(noise: Noise) -> Floats:
    """For each A/A cell of a machine, over its pairs: whether the report would call its second measurement
    different from its first.

    1 for different, 0 for not distinguishable, NaN for undecided. The floor is that of the other cells: with
    its own pairs in it, a cell would take part in judging itself. The family are the A/A cells.
    """
    cells = [own for _, own in noise.pairs.groupby("cell", sort=False)]
    if not cells:
        return np.array([])
    ends = np.array([interval(own["log_ratio"].to_numpy(dtype=float)) for own in cells])
    floors = np.array([noise.without(own).upper for own in cells])
    return differs(ends[:, 0], ends[:, 1], replicates=[len(own) for own in cells], floor=floors)


def smallest_found(log_ratios: Floats, replicates: int, floor: float, comparisons: int = 1) -> float:
    """The smallest slowdown, as a ratio, that is detected in 95 % of repetitions; NaN if there is none.

    By resampling: a repeat draws its replicates from the A/A pairs' log ratios, either twin first, and
    the slowdown shifts them all. How far each repeat must be shifted to be called different, if it is the
    only difference in a family of `comparisons`, follows from its interval; the answer is the 95th
    percentile.
    """
    if not log_ratios.size or replicates < 2:
        return float("nan")
    either = np.sort(np.concatenate([log_ratios, -log_ratios]))
    draws = np.random.default_rng(SEED).choice(either, size=(REPEATS, replicates))
    low, high = interval(draws)
    # where the p-value, times the number of comparisons, is 5 %
    mean = floor / NORMAL / np.sqrt(replicates) * stats.norm.isf((1 - LEVEL) / 2 / max(comparisons, 1))
    shift = np.maximum(floor_for(replicates, floor) - low, mean - (low + high) / 2)
    return float(np.exp(np.quantile(shift, FOUND)))


def summary(noises: Mapping[str, Noise], every: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """One row a machine of the cost cells; takes `noise_floor.noises`, the records of all twins and
    `statistics.cost_cells`.

    Columns: `machine`; `pairs` that the floor rests on, whether they are `contaminated`, and how many others
    were `left_out` because they are; `median` of |log ratio|, `floor` and its `upper` bound, as ratios;
    `method`; `judged` A/A cells and how many are `called` different; `comparisons` with dense in the
    report; `replicates`, the most usual number that is compared with dense, with the smallest slowdown
    `found` with them, and `found_suggested` with `SUGGESTED`; and `sampling`. NaN where there are no pairs.
    """
    rows: list[dict[str, Any]] = []
    comparisons = int(cost["differs"].notna().sum())
    for machine, cells in cost.groupby("machine", sort=True):
        noise = noises[str(machine)]
        logs, floor = noise.pairs["log_ratio"].to_numpy(dtype=float), noise.floor
        called = called_different(noise)
        usual = cells["rounds"][cells["rounds"] > 0].mode()
        replicates = int(usual.max()) if len(usual) else 0
        rows.append(
            {
                "machine": machine,
                **_pairs(noise),
                "judged": int((~np.isnan(called)).sum()),
                "called": int(np.nansum(called)),
                "comparisons": comparisons,
                "replicates": replicates,
                "found": smallest_found(logs, replicates, floor.upper, comparisons),
                "found_suggested": smallest_found(logs, SUGGESTED, floor.upper, comparisons),
                **sampling(every[every["machine"] == machine]),
            }
        )
    return pd.DataFrame(rows)


def by_length(noises: Mapping[str, Noise], every: pd.DataFrame) -> pd.DataFrame:
    """One row a machine and length that has timed cells: the pairs there, and the `sampling`.

    Columns as in `summary`, with `seq_len`. The floor is that of the cells of this length alone, to be
    compared with the machine's: comparisons use the machine's.
    """
    rows = []
    timed = every[(every["status"] == "ok") & (every[SECONDS] > 0)]
    for (machine, length), own in timed.groupby(["machine", "seq_len"], sort=True):
        noise = noises[str(machine)].at(own["seq_len"].iloc[0])
        rows.append({"machine": machine, "seq_len": length, **_pairs(noise), **sampling(own)})
    return pd.DataFrame(rows)


def _pairs(noise: Noise) -> dict[str, Any]:
    logs, floor = noise.pairs["log_ratio"].to_numpy(dtype=float), noise.floor
    return {
        "pairs": len(logs),
        "contaminated": bool(noise.pairs["contaminated"].any()),
        "left_out": len(noise.all_pairs) - len(logs),
        "median": float(np.exp(np.median(np.abs(logs)))) if logs.size else float("nan"),
        "floor": float(np.exp(floor.estimate)),
        "upper": float(np.exp(floor.upper)),
        "method": floor.method,
    }


def sampling(every: pd.DataFrame) -> dict[str, Any]:
    """How precisely the cells were sampled: the number of measurements that take part in figures, how many of
    them ended `sampled_short`, on their budget, and the median and the largest half-width of the 95 %
    interval of their medians, within a process and as a share."""
    timed = marked(every[(every["status"] == "ok") & (every[SECONDS] > 0)])
    timed = timed[takes_part(timed, CELL)] if len(timed) else timed
    width = timed[HALF_WIDTH].astype(float)
    return {
        "measurements": len(timed),
        "disturbed": int(timed[DISTURBED].sum()),
        "sampled_short": int(ended_short(timed).sum()),
        "half_width": float(width.median()),
        "half_width_largest": float(width.max()),
    }
