"""Ratios of cost against length, the length at which they pass 1, and how well it is known.

Between two measured lengths the logarithm of a ratio is taken as linear in the logarithm of the length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.different import NORMAL
from bench.report.data.intervals import LEVEL, Floats, student

FIGURES = {"time": f"{SECONDS}_ratio", "memory": "peak_bytes_ratio", "flops": "flops_executed_ratio"}
"""Name of a comparison → its column of the cost cells; times also have an interval."""
SAME = 1e-3
"""Ratios nearer to 1 than this are 1: a window that holds the whole sequence is not cheaper by a handful of
bytes."""


DRAWS, SEED = 2000, 0
"""Repeats of the bootstrap of a crossover, and the seed of each."""


def crossing(lengths: Sequence[float], ratios: Sequence[float]) -> tuple[str, float]:
    """Where ratios to dense, at ascending lengths, are below 1, and the length at which they last cross 1.

    ('from', T): cheaper from T tokens on; ('until', T): cheaper up to T only; ('always', the shortest
    length); ('never', the longest length).
    """
    logs = np.log(np.asarray(ratios, dtype=float))
    logs[np.abs(logs) < SAME] = 0.0
    cheaper = logs < 0
    if cheaper.all():
        return "always", float(lengths[0])
    if not cheaper.any():
        return "never", float(lengths[-1])
    last = int(np.flatnonzero(cheaper[1:] != cheaper[:-1])[-1])
    share = logs[last] / (logs[last] - logs[last + 1])
    places = np.log(np.asarray(lengths[last : last + 2], dtype=float))
    return ("from" if cheaper[-1] else "until"), float(np.exp(places[0] + share * (places[1] - places[0])))


def onsets(lengths: Sequence[float], logs: Floats) -> Floats:
    """For each row of log ratios, at ascending lengths, the length from which on they are below 0.

    0 if they are at all lengths, infinite if they are not at the longest: `crossing`, of many rows at once.
    """
    logs = np.where(np.abs(logs) < SAME, 0.0, logs)
    cheaper = logs < 0
    # the last length that is not cheaper; -1 if all are
    last = np.where(cheaper.all(axis=1), -1, logs.shape[1] - 1 - np.argmax(~cheaper[:, ::-1], axis=1))
    here = np.clip(last, 0, logs.shape[1] - 2)
    rows = np.arange(len(logs))
    before, after = logs[rows, here], logs[rows, here + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.clip(np.nan_to_num(before / (before - after)), 0, 1)  # of the rows that do not cross, any
    places = np.log(np.asarray(lengths, dtype=float))
    found = np.exp(places[here] + share * (places[here + 1] - places[here]))
    return np.where(last < 0, 0.0, np.where(last == logs.shape[1] - 1, np.inf, found))


def ratio_error(cells: pd.DataFrame) -> tuple[Floats, npt.NDArray[np.int_]]:
    """The standard error of the log ratio of times of each cell, and its degrees of freedom (0: as normal).

    It is the larger of two. Between cells: that which the noise floor gives, an upper bound of the difference
    of two cells with equal times, over the root of the rounds. Between rounds: that of the ratio's
    own interval. NaN where neither is known. Takes columns of `statistics.cost_cells`.
    """
    rounds = cells["rounds"].to_numpy(dtype=int)
    floor = np.log(cells["noise_floor"].to_numpy(dtype=float)) / NORMAL / np.sqrt(np.maximum(rounds, 1))
    ends = np.log(cells[[f"{SECONDS}_ratio_low", f"{SECONDS}_ratio_high"]].to_numpy(dtype=float))
    quantiles = np.array([student(n - 1) if n > 2 else 1.0 for n in rounds])
    own = (ends[:, 1] - ends[:, 0]) / 2 / quantiles
    is_own = ~np.isnan(own) & ~(own <= floor)
    return np.where(is_own, own, floor), np.where(is_own, np.maximum(rounds - 1, 0), 0)


def bracket(
    lengths: Sequence[float], ratios: Sequence[float], error: Floats, freedom: npt.NDArray[np.int_]
) -> tuple[float, float]:
    """The 95 % interval of the length from which on ratios to dense are below 1, as `onsets` has it.

    A parametric bootstrap: each repeat moves every log ratio by noise of its standard error, normal or of
    Student's t of so many degrees of freedom, and takes the crossing; the ends are percentiles. A resampling
    of the two to five rounds themselves would cover too little (see `intervals`) and would not contain the
    noise between cells. NaN where an error is not known.
    """
    if np.isnan(error).any():
        return float("nan"), float("nan")
    rng = np.random.default_rng(SEED)
    noise = rng.normal(size=(DRAWS, len(error)))
    t = freedom > 0
    if t.any():
        noise[:, t] = rng.standard_t(freedom[t], size=(DRAWS, int(t.sum())))
    found = onsets(lengths, np.log(np.asarray(ratios, dtype=float)) + noise * error)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)
