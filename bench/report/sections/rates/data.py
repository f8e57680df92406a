"""A search over learning rates: each variant's best, and whether a better one may lie beyond those tried."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.baselines import BASELINES
from bench.report.data.groups import SEARCH
from bench.report.data.statistics import BASELINE


def rate_cells(frame: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """One row a rate of every search, which is a cell trained at several rates; empty where none was.

    Columns: the keys, `learning_rate`, `replicates`, mean and standard deviation of `nll`, `bits_per_byte`
    and `perplexity` (NaN where none finished), the baselines, `diverged` (how many replicates), `leaks`,
    `undertrained`, and `best`: the rate of the least mean nll at which no replicate diverged. `quality` is
    `statistics.quality_cells` of the same records.
    """
    tried = frame[frame["status"].isin(["ok", "diverged"]) & frame["learning_rate"].notna()]
    several = tried.groupby(SEARCH, dropna=False)["learning_rate"].transform("nunique") > 1
    tried = tried[several]
    if tried.empty:
        return pd.DataFrame()
    keys = [*SEARCH, "learning_rate"]
    groups = tried.assign(diverged=tried["status"] == "diverged").groupby(keys, sort=False, dropna=False)
    cells = groups["diverged"].sum().reset_index()
    figures = [
        "nll_mean",
        "nll_std",
        "bits_per_byte_mean",
        "bits_per_byte_std",
        "perplexity_mean",
        "perplexity_std",
        "accuracy_mean",
        "accuracy_std",
        "leaks",
        "undertrained",
        "no_baseline",
        *BASELINES,
    ]
    cells = cells.merge(quality[[*keys, "quality_replicates", *figures]], on=keys, how="left")
    cells = cells.rename(columns={"quality_replicates": "replicates"})
    cells["leaks"] = cells["leaks"].eq(True)
    sound = cells["nll_mean"].where(cells["diverged"] == 0)
    lowest = sound.groupby([cells[key] for key in SEARCH], dropna=False).transform("min")
    cells["best"] = sound == lowest
    cells = cells.assign(later=cells["variant"] != BASELINE)
    order = [*(key for key in SEARCH if key not in ("variant", "label")), "later", "label", "learning_rate"]
    return cells.sort_values(order, ignore_index=True).drop(columns="later")


def best_rates(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a search: its best rate with its figures, `tried`, `diverged`, and `edge`.

    `tried` are all rates in ascending order, `diverged` those at which a replicate diverged. `edge` is
    'lowest' or 'highest' where the best is the end of the rates tried, so that a better one may lie beyond;
    else ''. Without a best rate (all diverged) the figures are NaN.
    """
    rows = []
    for _, own in cells.groupby(SEARCH, sort=False, dropna=False):
        best = own[own["best"]]
        tried = sorted(own["learning_rate"])
        row: dict[str, Any] = {**(best if len(best) else own.assign(**_NOTHING)).iloc[0]}
        rate = row["learning_rate"]
        row["edge"] = "lowest" if rate == tried[0] else "highest" if rate == tried[-1] else ""
        row["tried"], row["diverged"] = tried, sorted(own.loc[own["diverged"] > 0, "learning_rate"])
        rows.append(row)
    return pd.DataFrame(rows)


_NOTHING = dict.fromkeys(
    (
        "learning_rate",
        *(f"{name}_{kind}" for name in ("nll", "bits_per_byte", "perplexity") for kind in ("mean", "std")),
    ),
    float("nan"),
)
