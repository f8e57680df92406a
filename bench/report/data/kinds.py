"""Records by kind of cell: ordinary cells, searches for the sizes that fit, and runs at the largest batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

KEEP = "keep"
"""The activation strategy that saves everything, which the others are compared with."""


def predicted(sources: pd.Series[Any]) -> pd.Series[bool]:
    """Whether each `peak_bytes_source` means that the peak was not measured."""
    return sources.astype(object).fillna("").astype(str).str.contains("predicted")


def has_list(values: pd.Series[Any]) -> pd.Series[bool]:
    """Whether each value is a list with elements."""
    return values.map(lambda value: isinstance(value, list) and len(value) > 0).astype(bool)


def with_lists(frame: pd.DataFrame, *keys: str) -> pd.DataFrame:
    """The finished records that have a list with elements at each of the keys."""
    kept = frame[frame["status"] == "ok"]
    for key in keys:
        kept = kept[has_list(kept[key])]
    return kept


@dataclass(frozen=True)
class Kinds:
    """An experiment's records by the question of their cell.

    `plain`: an ordinary cell. `fits`: what fits into a budget. `payoff`: training at the largest batch that
    fits. A cell of a given batch that was measured and also searched for what fits is in the first two.
    `decoding`: cells that measured decoding; they are in `plain` too if they also measured a step or trained.
    """

    plain: pd.DataFrame
    fits: pd.DataFrame
    payoff: pd.DataFrame
    decoding: pd.DataFrame


def kinds(frame: pd.DataFrame) -> Kinds:
    """The records by kind; `budget_bytes` is filled in for a cell that stopped before it was known."""
    decoding = frame["decode_source"].notna()
    other = (
        frame[["params", "nll"]].notna().any(axis=1)
    )  # a step was measured or predicted, or a model trained
    frame, decoded = frame[~decoding | other], frame[decoding]
    # A batch that is to be found is 0 until it is.
    fitted = (frame["batch_size"] == frame["largest_batch_size"]) & frame["longest_seq_len"].isna()
    payoff = fitted | (frame["batch_size"] == 0)
    frame = frame.assign(budget_bytes=_budget(frame, payoff))
    fits = frame["budget_bytes"].notna() & ~payoff
    measured = frame["peak_bytes"].notna() & ~predicted(frame["peak_bytes_source"])
    return Kinds(frame[~payoff & (~fits | measured)], frame[fits], frame[payoff], decoded)


def _budget(frame: pd.DataFrame, payoff: pd.Series[bool]) -> pd.Series[float]:
    """The budget; of an unfinished cell that names none, the one that all its finished peers name."""
    keys = [frame["name"], frame["measure"], payoff]
    ok = frame["status"] == "ok"
    named = frame["budget_bytes"].where(ok).groupby(keys)
    unnamed = (ok & frame["budget_bytes"].isna()).groupby(keys).transform("any")
    usual = named.transform("first").where((named.transform("nunique") == 1) & ~unnamed)
    return frame["budget_bytes"].fillna(usual)
