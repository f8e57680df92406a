"""Where each variant becomes cheaper than dense attention, as a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.text import units
from bench.report.text.columns import Column
from bench.report.text.marks import CONTAMINATED

Row = dict[str, "pd.Series[Any]"]


def crossings(cells: pd.DataFrame) -> list[Column]:
    """A row a variant, within one group; takes rows of `crossover.crossovers`."""
    parts = list(cells.groupby("label", sort=False))
    rows: list[Row] = [{str(own["figure"]): own for _, own in part.iterrows()} for _, part in parts]
    anyone = [next(iter(row.values())) for row in rows]
    timed = [row.get("time", one) for row, one in zip(rows, anyone, strict=True)]
    return [
        Column("variant", [str(label) for label, _ in parts], right=False, optional=False),
        Column("lengths", [_measured(one) for one in anyone], optional=False),
        Column("cheaper in time", [_outcome(row, "time") for row in rows], right=False),
        Column("in peak memory", [_outcome(row, "memory") for row in rows], right=False),
        Column("in executed FLOPs", [_outcome(row, "flops") for row in rows], right=False),
        Column("loss over dense", [_loss(row) for row in timed]),
    ]


def _measured(row: pd.Series[Any]) -> str:
    first, last = units.length(row["first"]), units.length(row["last"])
    return first if first == last else f"{first}–{last}"


def _outcome(row: Row, figure: str) -> str:
    """'from 1,870 on (1,610 to 2,240)', 'never up to 4k (perhaps from 3,800)', 'up to 900 alone'."""
    if figure not in row:
        return units.MISSING
    crossover = row[figure]
    length = units.digits(crossover["length"])
    words = {
        "always": f"from {units.length(crossover['first'])} on, the shortest",
        "never": f"never up to {units.length(crossover['last'])}",
        "from": f"from {length} on",
        "until": f"up to {length} alone",
    }
    mark = CONTAMINATED if crossover[DISTURBED] else ""
    return words[crossover["outcome"]] + _interval(crossover) + mark


def _interval(row: pd.Series[Any]) -> str:
    """The bracket of the length; empty without one, or if it leaves no doubt."""
    low, high = row["low"], row["high"]
    if units.missing(low) or units.missing(high) or low == high:
        return ""
    if row["outcome"] == "from":
        lower = f"≤ {units.length(row['first'])}" if low == 0 else units.digits(low)
        upper = f"> {units.length(row['last'])}" if np.isinf(high) else units.digits(high)
        return f" ({lower} to {upper})"
    if row["outcome"] == "always":
        return " (perhaps never)" if np.isinf(high) else f" (perhaps only from {units.digits(high)})"
    return " (perhaps at all lengths)" if low == 0 else f" (perhaps from {units.digits(low)})"


def _loss(row: pd.Series[Any]) -> str:
    """'+0.051 (0.020 to 0.082) at 1k'; the model's size too where it is another."""
    if units.missing(row["nll_lost"]):
        return units.MISSING
    low, high = row["nll_lost_low"], row["nll_lost_high"]
    spread = "" if units.missing(low) else f" ({low:+.3f} to {high:+.3f})"
    words = [f"{row['nll_lost']:+.3f}{spread} at {units.length(row['quality_seq_len'])}"]
    if row["quality_width"] != row["d_model"]:
        words.append(f"width {row['quality_width']:.0f}")
    if row["quality_depth"] != row["depth"]:
        words.append(f"depth {row['quality_depth']:.0f}")
    return ", ".join(words)
