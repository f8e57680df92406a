"""Accuracies as tables: a row a variant, a column a setting of the task's knobs, guessing first."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report import markdown, units
from bench.report.groups import TASK, TRAINING, natural, varying
from bench.report.markdown import Column, escape
from bench.report.recall import ROW
from bench.report.tables import each, label_of, training_columns

GUESSING = "*guessing*"


def accuracies(cells: pd.DataFrame) -> str:
    """The accuracies of one task; for each length what guessing comes to, then the variants."""
    columns = sorted(cells["knobs"].unique(), key=natural)
    rows: list[pd.Series[Any]] = []
    values: list[list[str]] = []
    for _, same in cells.groupby("seq_len", sort=True):
        rows.append(_guessing(same))
        at = same.set_index("knobs")["guess_accuracy"].groupby(level=0).median()
        values.append([units.share(at.get(knobs)) for knobs in columns])
        for _, own in same.groupby(ROW, sort=False, dropna=False):
            rows.append(own.iloc[0].copy())
            for name in ("tokens_trained", "state_bytes", "replicates", "reach"):
                rows[-1][name] = own[name].max()
            cell = {c["knobs"]: units.share(c["accuracy_mean"], c["accuracy_std"]) for _, c in own.iterrows()}
            values.append([cell.get(knobs, units.MISSING) for knobs in columns])
    table = pd.DataFrame(rows).reset_index(drop=True)
    guessing = table["label"] == GUESSING
    apart = varying(cells, [key for key in TASK if key not in ("objective", "data")])
    shown = [GUESSING if g else label_of(row) for g, (_, row) in zip(guessing, table.iterrows(), strict=True)]
    reach = [
        "all" if value >= length - 1 else units.whole(value)
        for value, length in zip(table["reach"], table["seq_len"], strict=True)
    ]
    return markdown.table(
        [
            Column("variant", shown, right=False, optional=False),
            *(each(table, key, key, _or_dash, right=False) for key in apart),
            each(table, "length", "seq_len", str, optional=False),
            each(table, "depth", "depth", units.whole, optional=False),
            *training_columns(table, varying(cells, TRAINING)),
            each(table, "tokens trained", "tokens_trained", units.count),
            *(
                Column(escape(knobs) or "accuracy", list(of), optional=False)
                for knobs, of in zip(columns, zip(*values, strict=True), strict=True)
            ),
            each(table, "state", "state_bytes", units.size),
            Column("reaches", reach),
            each(table, "replicates", "replicates", units.whole, optional=False),
        ]
    )


def _guessing(same: pd.DataFrame) -> pd.Series[Any]:
    """A row that has a length and nothing else."""
    return pd.Series(
        {"label": GUESSING, "seq_len": same["seq_len"].iloc[0]}, index=same.columns, dtype=object
    )


def _or_dash(value: object) -> str:
    return units.MISSING if value is None or value != value else escape(value)
