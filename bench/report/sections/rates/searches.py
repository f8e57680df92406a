"""Searches for a learning rate within cells: what was tried, and whether losses or chance decided.

A search trains once at each rate, so its noise is that of a difference between two trainings. It is estimated
as √2 standard deviations of the final loss over replicates. A search with the smallest budget compares losses
of a shorter training, whose noise may be larger.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.groups import CELL, SEARCH


def search_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a search of `measure.learning_rate=search`; empty where no cell searched.

    Columns: the keys, `learning_rate` (the rate taken), `tried` (all rates, ascending) and `nlls` (their
    losses, in nats per token; NaN if training diverged), `edge` ('lowest' or 'highest' where the rate taken
    is the end of those tried, else ''), `gap` (how much larger the second least loss is), `noise` (of a
    difference of two trainings; NaN with one replicate), `decided` (whether the gap exceeds the noise; None
    if either is unknown), `replicates`.
    """
    searched = frame[frame["learning_rates_tried"].notna() & frame["learning_rate"].notna()]
    if searched.empty:
        return pd.DataFrame()
    keys = [*SEARCH, "learning_rate"]
    searched = searched.sort_values(["written", "cell_id"], kind="stable")
    rows = []
    for _, own in searched.groupby(keys, sort=False, dropna=False):
        last = own.iloc[-1]
        rows.append({**{key: last[key] for key in keys}, **_figures(own)})
    cells = pd.DataFrame(rows)
    order = [key for key in (*CELL, "learning_rate") if key in cells]
    return cells.sort_values(order, ignore_index=True, kind="stable")


def _figures(own: pd.DataFrame) -> dict[str, Any]:
    """What replicates that share a search say about it."""
    last = own.iloc[-1]
    tried = [float(rate) for rate in last["learning_rates_tried"]]
    nlls = [math.nan if nll is None else float(nll) for nll in last["learning_rate_nlls"]]
    least = np.sort([nll for nll in nlls if not math.isnan(nll)])
    gap = float(least[1] - least[0]) if len(least) > 1 else math.nan
    finished = own[own["status"] == "ok"].groupby("replicate")["nll"].mean()
    noise = math.sqrt(2) * float(finished.std()) if len(finished) > 1 else math.nan
    ends = {tried[0]: "lowest", tried[-1]: "highest"} if len(tried) > 1 else {}
    return {
        "tried": tried,
        "nlls": nlls,
        "edge": ends.get(float(last["learning_rate"]), ""),
        "gap": gap,
        "noise": noise,
        "decided": None if math.isnan(gap) or math.isnan(noise) else gap > noise,
        "replicates": len(finished),
    }
