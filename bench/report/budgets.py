"""Records that ask what fits into a memory budget: told apart from the others, and aggregated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.groups import FIT, PAYOFF
from bench.report.intervals import by_cell
from bench.report.memory import BASELINE, ordered, predicted
from bench.report.statistics import distinct, status_counts

LONGEST, LARGEST = 2**22, 2**16
"""Tokens and sequences at which the search for what fits ends: what it finds there is a lower bound."""


@dataclass(frozen=True)
class Kinds:
    """An experiment's records by what they were asked.

    `plain` are those of an ordinary cell, `fits` what fits, `payoff` a batch that is the largest
    that fits. A cell of a given batch that was measured and asked what fits is in the first two.
    """

    plain: pd.DataFrame
    fits: pd.DataFrame
    payoff: pd.DataFrame


def kinds(frame: pd.DataFrame) -> Kinds:
    """The records by kind, their `budget_bytes` filled in where a cell stopped before it said."""
    # A batch that is to be found is 0 until it is.
    found = (frame["batch_size"] == frame["largest_batch_size"]) & frame["longest_seq_len"].isna()
    payoff = found | (frame["batch_size"] == 0)
    frame = frame.assign(budget_bytes=_budget(frame, payoff))
    fits = frame["budget_bytes"].notna() & ~payoff
    measured = frame["peak_bytes"].notna() & ~predicted(frame["peak_bytes_source"])
    return Kinds(frame[~payoff & (~fits | measured)], frame[fits], frame[payoff])


def _budget(frame: pd.DataFrame, payoff: pd.Series[bool]) -> pd.Series[float]:
    """The budget; of an unfinished cell that names none, the one that all its finished peers name."""
    keys = [frame["name"], frame["measure"], payoff]
    ok = frame["status"] == "ok"
    named = frame["budget_bytes"].where(ok).groupby(keys)
    unnamed = (ok & frame["budget_bytes"].isna()).groupby(keys).transform("any")
    usual = named.transform("first").where((named.transform("nunique") == 1) & ~unnamed)
    return frame["budget_bytes"].fillna(usual)


def fits_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a depth, variant and strategy: `longest_seq_len`, `largest_batch_size`, `status`.

    Of several replicates the least counts: what fits must fit them all.
    """
    keys = [*FIT, "depth", "variant", "label", "activations"]
    found = frame.groupby(keys, sort=False, dropna=False)
    cells = found[["longest_seq_len", "largest_batch_size"]].min()
    cells["status"] = found["status"].agg(status_counts)
    return ordered(cells.reset_index())


def payoff_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a depth, variant and strategy: the batch that fits and what training at it yields.

    Columns: the keys, `largest_batch_size`, `tokens_per_second` with its interval as `_low` and
    `_high`, `gain` (median over replicates of the throughput over that of `keep` in the same
    replicate), `peak_bytes`, `peak_bytes_source`, `contaminated`, `replicates`, `status`.
    """
    keys = [*PAYOFF, "depth", "variant", "label", "activations"]
    ok = frame["status"] == "ok"
    figures = ["tokens_per_second", "peak_bytes"]
    frame = frame.assign(**{name: frame[name].where(ok) for name in figures})
    peers = [key for key in (*keys, "replicate") if key != "activations"]
    kept = frame[frame["activations"] == BASELINE].groupby(peers)["tokens_per_second"].median()
    against = kept.reindex(pd.MultiIndex.from_frame(frame[peers])).to_numpy()
    frame = frame.assign(gain=frame["tokens_per_second"] / against)
    found = frame.groupby(keys, sort=False, dropna=False)
    ends = by_cell(frame.set_index(keys)["tokens_per_second"], keys)
    columns: dict[str, pd.Series[Any]] = {
        "largest_batch_size": found["largest_batch_size"].min(),
        "tokens_per_second": found["tokens_per_second"].median(),
        "tokens_per_second_low": ends["low"],
        "tokens_per_second_high": ends["high"],
        "gain": found["gain"].median(),
        "peak_bytes": found["peak_bytes"].median(),
        "peak_bytes_source": found["peak_bytes_source"].agg(distinct),
        "contaminated": frame["contaminated"].where(ok).groupby([frame[k] for k in keys]).count(),
        "replicates": frame["replicate"].where(ok).groupby([frame[k] for k in keys]).nunique(),
        "status": found["status"].agg(status_counts),
    }
    return ordered(pd.DataFrame(columns).reset_index())
