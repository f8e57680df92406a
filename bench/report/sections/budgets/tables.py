"""Tables of the sizes that fit into a memory budget, and of the throughput at the largest batch."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.disturbed import RATIO_DISTURBED
from bench.report.sections.budgets.data import LARGEST, LONGEST
from bench.report.text import units
from bench.report.text.columns import Column, each
from bench.report.text.marks import PREDICTED, disturbed, interval, timed

NOTHING = "nothing fits"


def fits(cells: pd.DataFrame) -> list[Column]:
    """A row a variant and strategy; for each depth the longest sequence and the largest batch.

    The cells are those of one budget and one given length and batch.
    """
    names = cells[["label", "activations"]].drop_duplicates()
    rows = list(zip(names["label"], names["activations"], strict=True))
    columns = [
        Column("variant", [label for label, _ in rows], right=False, optional=False),
        Column("activations", [strategy for _, strategy in rows], right=False, optional=False),
    ]
    for depth in sorted(cells["depth"].unique()):
        at = {(c["label"], c["activations"]): c for _, c in cells[cells["depth"] == depth].iterrows()}
        cells_of_rows = [at.get(row) for row in rows]
        columns.append(Column(f"depth {depth}: longest", [longest(cell) for cell in cells_of_rows]))
        columns.append(Column(f"depth {depth}: batch", [largest(cell) for cell in cells_of_rows]))
    return columns


def longest(cell: pd.Series[Any] | None) -> str:
    """The longest sequence that fits, in words."""
    return units.MISSING if cell is None else _found(cell, "longest_seq_len", LONGEST)


def largest(cell: pd.Series[Any] | None) -> str:
    """The largest batch that fits, in words."""
    return units.MISSING if cell is None else _found(cell, "largest_batch_size", LARGEST)


def _found(cell: pd.Series[Any], figure: str, end: int) -> str:
    """The result of the search; 'nothing fits' for 0, '≥' at the end of the search, else the status."""
    value = cell[figure]
    if pd.isna(value):
        return str(cell["status"])
    if value == 0:
        return NOTHING
    number = units.length(value) if figure == "longest_seq_len" else f"{value:,.0f}"
    return f"≥ {number}" if value >= end else number


def payoff(cells: pd.DataFrame) -> list[Column]:
    """Throughput and memory of each variant's strategies for one budget, depth and length."""
    rows = [row for _, row in cells.iterrows()]
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        each(cells, "activations", "activations", str, right=False, optional=False),
        Column("largest batch", [_found(row, "largest_batch_size", LARGEST) for row in rows]),
        Column("throughput", [timed(row, "tokens_per_second", units.rate) for row in rows]),
        Column("95 % interval", interval(rows, "tokens_per_second", "rate")),
        Column("/ keep", [disturbed(row, "gain", units.ratio, RATIO_DISTURBED) for row in rows]),
        Column("peak memory", [_peak(row) for row in rows]),
        each(cells, "replicates", "replicates", str, optional=False),
        each(cells, "status", "status", str, right=False, optional=False),
    ]


def _peak(row: pd.Series[Any]) -> str:
    mark = (
        PREDICTED if "predicted" in str(row["peak_bytes_source"]) and not pd.isna(row["peak_bytes"]) else ""
    )
    return units.size(row["peak_bytes"]) + mark
