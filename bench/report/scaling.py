"""How cost grows with length and with depth: fitted exponents, beside those that papers claim.

An exponent is the slope of log cost against log length (or depth), by least squares. Whatever does not grow
with the length, or grows more slowly than attention, bends the line at short lengths; so the longest ones
are fitted, and how long they are is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bench.report.groups import GROUP, SETTING, split
from bench.report.intervals import student
from bench.report.statistics import BASELINE

SPAN = 8
"""The sizes fitted lie within this factor of the largest, if they are `FEWEST` or more."""
FEWEST = 3
"""Points of a line whose slope has an interval."""
TOLERANCE = 0.1
"""An exponent contradicts a claim where its interval is further from it than this. A log T that claims leave
out is worth 1 / ln T, some 0.1 at these lengths; a stride rounded to a power of two, about as much."""


@dataclass(frozen=True)
class Figure:
    """What is fitted: its name, its column of the cost cells, and the claims that it is held against."""

    name: str
    column: str
    by_length: str | None = None
    """The column that claims its exponent in the length."""
    by_depth: str | None = None
    surveyed: bool = False
    """Whether the survey's exponent, of attention in the length, speaks of it."""


FIGURES = (
    Figure("time", "step_seconds_median", "claimed_time_exponent"),
    Figure("memory", "peak_bytes_median", "claimed_memory_exponent"),
    Figure("saved", "activation_bytes", "claimed_memory_exponent", "claimed_depth_exponent"),
    Figure("attention", "flops_attention_step", "claimed_time_exponent", surveyed=True),
    Figure("algorithmic", "flops_algorithmic_step"),
    Figure("executed", "flops_executed_step"),
)


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
    error = float(line.stderr) if np.ptp(logs[:, 1]) else 0.0  # of what does not grow at all scipy has none
    off = student(len(taken) - 2) * error
    slope = float(line.slope)
    return Fit(slope, slope - off, slope + off, len(taken), float(taken[0, 0]), float(taken[-1, 0]))


def verdict(found: Fit, claim: float | None) -> str:
    """'above' or 'below' where the interval excludes the claim by more than `TOLERANCE`; else ''."""
    if claim is None or np.isnan(claim):
        return ""
    if found.low > claim + TOLERANCE:
        return "above"
    return "below" if found.high < claim - TOLERANCE else ""


def exponents(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, setting, axis and figure that has `FEWEST` sizes or more; may be empty.

    Takes `statistics.cost_cells`. Columns: the keys of `groups.SETTING`, `axis` (seq_len or depth), the other
    of the two (null for the one that is the axis), `variant`, `label`, `figure` (a name of `FIGURES`),
    `exponent` with its 95 % interval `low` to `high`, `points`, `first` and `last` size fitted, `claim` and
    `claim_source`, `verdict`, `survey` and `survey_verdict`.
    """
    rows = [
        *_along(cells, "seq_len", [*GROUP, "variant", "label"]),
        *_along(cells, "depth", [*SETTING, "seq_len", "variant", "label"]),
    ]
    if not rows:
        return pd.DataFrame()
    table = pd.DataFrame(rows).astype({"seq_len": "Int64", "depth": "Int64"})  # whole, though one is null
    table["later"] = table["variant"] != BASELINE
    order = ["axis", *SETTING, "depth", "seq_len", "later", "label"]
    return table.sort_values(order, ignore_index=True, kind="stable").drop(columns="later")


def _along(cells: pd.DataFrame, axis: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The fits of one axis, all else that decides a cell fixed."""
    for values, own in split(cells, keys):
        for figure in FIGURES:
            found = fit(list(own[axis]), list(own[figure.column]))
            if found is None:
                continue
            by_length = axis == "seq_len"
            name = figure.by_length if by_length else figure.by_depth
            claim = np.nan if name is None else own[name].median()
            survey = own["survey_exponent"].median() if by_length and figure.surveyed else np.nan
            yield {
                "axis": axis,
                axis: None,
                **values,
                "figure": figure.name,
                **vars(found),
                "claim": claim,
                "claim_source": own["claim_source"].iloc[0] if by_length else None,
                "verdict": verdict(found, claim),
                "survey": survey,
                "survey_verdict": verdict(found, survey),
            }
