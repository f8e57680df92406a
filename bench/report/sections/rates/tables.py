"""Each variant's best learning rate as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.groups import SETTING, TRAINING, varying
from bench.report.sections.rates.data import best_rates
from bench.report.text import units
from bench.report.text.cells import label_of, plus_minus, training_columns
from bench.report.text.columns import Column, each


def rates(cells: pd.DataFrame) -> list[Column]:
    """A row a search; takes `rates.rate_cells`."""
    table = best_rates(cells)
    rows = [row for _, row in table.iterrows()]
    varying_keys = [key for key in varying(table, SETTING) if key not in ("objective", "corpus")]
    other = ["eval_split", *(key for key in varying(table, TRAINING) if key != "learning_rate")]
    return [
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
        *(each(table, key, key, str, right=False) for key in varying_keys),
        each(table, "length", "seq_len", str, optional=False),
        each(table, "depth", "depth", str, optional=False),
        *training_columns(table, other),
        each(table, "best rate", "learning_rate", units.learning_rate, optional=False),
        Column("bits per byte", [plus_minus(r["bits_per_byte_mean"], r["bits_per_byte_std"]) for r in rows]),
        Column("perplexity", [plus_minus(r["perplexity_mean"], r["perplexity_std"]) for r in rows]),
        Column("accuracy", [units.share(r["accuracy_mean"], r["accuracy_std"]) for r in rows]),
        each(table, "loss", "nll_mean", units.score),
        Column("at the edge", [_edge(row) for row in rows], right=False, optional=False),
        Column("rates tried", [_listed(row["tried"]) for row in rows], right=False, optional=False),
        Column("diverged", [_listed(row["diverged"]) for row in rows], right=False),
        each(table, "replicates", "replicates", units.whole, optional=False),
    ]


def _edge(row: pd.Series[Any]) -> str:
    """Whether a better rate may lie beyond those tried."""
    if pd.isna(row["learning_rate"]):
        return units.MISSING
    return f"{row['edge']} tried" if row["edge"] else "no"


def _listed(rates: list[float]) -> str:
    return ", ".join(units.learning_rate(rate) for rate in rates) or units.MISSING
