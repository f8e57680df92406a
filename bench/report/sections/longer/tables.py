"""Bits per byte at lengths, or with memories, beyond those of training: a row a cell."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.groups import SETTING, TRAINING, varying
from bench.report.sections.longer.data import KEYS, LENGTH, MEMORY, verdict
from bench.report.text import units
from bench.report.text.cells import label_of, or_dash, plus_minus, training_columns
from bench.report.text.columns import Column, each
from bench.report.text.marks import OF_TWO


def lengths(cells: pd.DataFrame) -> list[Column]:
    """A row a cell; cells without figures have the reason. No columns if there is no cell."""
    own = cells[cells["kind"] != MEMORY]
    return _columns(own, LENGTH) if len(own) else []


def memories(cells: pd.DataFrame) -> list[Column]:
    """A row a cell with a memory; no columns if there is none."""
    own = cells[cells["kind"] == MEMORY]
    return _columns(own, MEMORY) if len(own) else []


def _columns(cells: pd.DataFrame, kind: str) -> list[Column]:
    parts = [own for _, own in cells.groupby(KEYS, sort=False, dropna=False)]
    table = pd.DataFrame([own.iloc[0] for own in parts]).reset_index(drop=True)
    rows = [row for _, row in table.iterrows()]
    factors = sorted(cells["factor"].dropna().unique())
    keys = [key for key in varying(table, SETTING) if key not in ("corpus", "d_model", "heads")]
    named = "trained at" if kind == LENGTH else "memory in training"
    sizes = [units.whole(row["seq_len"] if kind == LENGTH else row["size"]) for row in rows]
    return [
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
        *(each(table, key, key, str, right=False) for key in keys),
        Column("positions", [or_dash(row["positions"]) for row in rows], right=False, optional=False),
        *([] if kind == LENGTH else [each(table, "length", "seq_len", str, optional=False)]),
        each(table, "depth", "depth", str, optional=False),
        *training_columns(table, varying(table, TRAINING)),
        Column(named, sizes, optional=False),
        *(
            Column(f"at {factor:g}×", [_cell(own, factor) for own in parts], optional=False)
            for factor in factors
        ),
        Column("verdict", [or_dash(verdict(own)) for own in parts], right=False),
        each(table, "replicates", "replicates", units.whole, optional=False),
        each(table, "why not", "reason", or_dash, right=False),
    ]


def _cell(own: pd.DataFrame, factor: float) -> str:
    """Bits per byte; beyond factor 1 with the difference to it: '2.431 (+0.019 ± 0.006)'."""
    at = own[own["factor"] == factor]
    if at.empty:
        return units.MISSING
    row: pd.Series[Any] = at.iloc[0]
    if factor == 1:
        return plus_minus(row["bits_per_byte_mean"], row["bits_per_byte_std"])
    return f"{units.score(row['bits_per_byte_mean'])} ({_difference(row)})"


def _difference(row: pd.Series[Any]) -> str:
    """A difference with its sign, and half the width of its interval if that is known."""
    if units.missing(row["extra"]):
        return units.MISSING
    text = f"{round(row['extra'], 3) + 0.0:+.3f}"  # no negative 0
    if units.missing(row["extra_half"]):
        return text
    return f"{text} ± {row['extra_half']:.3f}" + (OF_TWO if row["replicates"] == 2 else "")
