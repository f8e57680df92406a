"""Accuracies as tables: a row a variant, a column a setting of the task's knobs, guessing first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from bench.report.data.groups import SETTING, natural, varying
from bench.report.sections.recall.data import beyond, trained_apart
from bench.report.text import units
from bench.report.text.cells import label_of, training_columns
from bench.report.text.columns import Column, each

GUESSING = "guessing"


def accuracies(cells: pd.DataFrame) -> list[Column]:
    """The accuracies of one task; for each length the accuracy of guessing, then the variants.

    Where the length follows from the knobs, it is part of the columns' titles.
    """
    follows = cells["seq_len"].nunique() > 1 and not beyond(cells, ["seq_len"], ["knobs"])
    columns = sorted(cells["knobs"].unique(), key=natural)
    varying_keys = [key for key in varying(cells, SETTING) if key not in ("objective", "corpus")]
    trained = trained_apart(cells)
    keys = [
        *varying_keys,
        "depth",
        "variant",
        "label",
        *([] if follows else ["seq_len"]),
        *trained,
        "state_policy",
    ]
    rows: list[pd.Series[Any]] = []
    values: list[list[str]] = []
    for _, same in [(0, cells)] if follows else cells.groupby("seq_len", sort=True):
        rows.append(_guessing(same))
        guess = same.groupby("knobs")["guess_accuracy"].median()
        values.append([units.share(guess.get(knobs)) for knobs in columns])
        for _, own in same.groupby(keys, sort=False, dropna=False):
            rows.append(_summed_up(own))
            cell = {c["knobs"]: units.share(c["accuracy_mean"], c["accuracy_std"]) for _, c in own.iterrows()}
            values.append([cell.get(knobs, units.MISSING) for knobs in columns])
    table = pd.DataFrame(rows).reset_index(drop=True)
    titles = [
        ", ".join([knobs, *([f"length {length}"] if follows else [])])
        for knobs, length in zip(columns, cells.groupby("knobs")["seq_len"].first()[columns], strict=True)
    ]
    return [
        each(table, "variant", "shown", str, right=False, optional=False),
        *(each(table, key, key, _or_dash, right=False) for key in varying_keys),
        *([] if follows else [each(table, "length", "seq_len", str, optional=False)]),
        each(table, "depth", "depth", units.whole, optional=False),
        *training_columns(table, trained),
        each(table, "learning rate", "rates", str),
        each(table, "tokens trained", "tokens", str),
        *(
            Column(title or "accuracy", list(of), optional=False)
            for title, of in zip(titles, zip(*values, strict=True), strict=True)
        ),
        each(table, "state", "state", str),
        each(table, "reaches", "reaches", str),
        each(table, "replicates", "replicates", str, optional=False),
    ]


def _summed_up(own: pd.DataFrame) -> pd.Series[Any]:
    """The first cell of a row; keys that may differ among its cells are texts."""
    whole = own["reach"] >= own["seq_len"] - 1
    reach = "all" if whole.all() else _range(own["reach"], units.whole)
    row = own.iloc[0].copy()
    row["shown"], row["reaches"] = label_of(row), reach
    row["tokens"] = _range(own["tokens_trained"], units.count)
    row["rates"] = _range(own["learning_rate"], units.learning_rate)
    row["state"] = units.between(own["sequence_state_bytes"].min(), own["sequence_state_bytes"].max(), "size")
    row["replicates"] = _range(own["replicates"], units.whole)
    return row


def _range(values: pd.Series[float], show: Callable[[float], str]) -> str:
    low, high = show(values.min()), show(values.max())
    return low if low == high else f"{low}–{high}"


def _guessing(same: pd.DataFrame) -> pd.Series[Any]:
    """A row with a length and no other figure."""
    texts = dict.fromkeys(("tokens", "rates", "state", "reaches", "replicates"), units.MISSING)
    row = pd.Series({"seq_len": same["seq_len"].iloc[0]}, index=same.columns, dtype=object)
    for name, text in {"shown": GUESSING, **texts}.items():
        row[name] = text
    return row


def _or_dash(value: object) -> str:
    return units.MISSING if value is None or value != value else str(value)
