"""Exponents of cost in length and in depth, fitted, with those that papers claim; see `data.power_law`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import GROUP, SETTING, split
from bench.report.data.power_law import fit, verdict
from bench.report.data.statistics import BASELINE


@dataclass(frozen=True)
class Figure:
    """A figure to fit: its name, its column of the cost cells, and the claims that it is compared with."""

    name: str
    column: str
    by_length: str | None = None
    """The column that claims its exponent in the length."""
    by_depth: str | None = None
    timed: bool = False
    """Whether a disturbance changes it."""
    surveyed: bool = False
    """Whether the survey's exponent, of attention in the length, speaks of it."""


FIGURES = (
    Figure("time", f"{SECONDS}_median", "claimed_time_exponent", timed=True),
    Figure("memory", "peak_bytes_median", "claimed_memory_exponent"),
    Figure("saved", "activation_bytes", "claimed_memory_exponent", "claimed_depth_exponent"),
    Figure("attention", "flops_attention_step", "claimed_time_exponent", surveyed=True),
    Figure("algorithmic", "flops_algorithmic_step"),
    Figure("executed", "flops_executed_step"),
)


def exponents(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, setting, axis and figure that has `FEWEST` sizes or more; may be empty.

    Takes `statistics.cost_cells`. Columns: the keys of `groups.SETTING`, `axis` (seq_len or depth), the other
    of the two (null for the one that is the axis), `variant`, `label`, `figure` (a name of `FIGURES`),
    `exponent` with its 95 % interval `low` to `high`, `points`, `first` and `last` size fitted, `claim` and
    `claim_source`, `verdict`, `survey` and `survey_verdict`, and `disturbed`: whether a time among those
    fitted is of disturbed measurements. Such a fit contradicts no claim.
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
            law = fit(list(own[axis]), list(own[figure.column]))
            if law is None:
                continue
            by_length = axis == "seq_len"
            sizes = own[axis].between(law.first, law.last) & own[figure.column].notna()
            disturbed = figure.timed and bool((own[DISTURBED] & sizes).any())
            name = figure.by_length if by_length else figure.by_depth
            claim = np.nan if name is None else own[name].median()
            survey = own["survey_exponent"].median() if by_length and figure.surveyed else np.nan
            yield {
                "axis": axis,
                axis: None,
                **values,
                "figure": figure.name,
                **vars(law),
                "claim": claim,
                "claim_source": own["claim_source"].iloc[0] if by_length else None,
                "verdict": "" if disturbed else verdict(law, claim),
                DISTURBED: disturbed,
                "survey": survey,
                "survey_verdict": verdict(law, survey),
            }
