"""Learning rates as tables: each variant's best, and what searches within cells tried."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from bench.report.data.groups import GROUP, SETTING, TRAINING, varying
from bench.report.sections.rates.data import best_rates
from bench.report.text import units
from bench.report.text.cells import label_of, or_dash, plus_minus, training_columns
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


def searches(cells: pd.DataFrame) -> list[Column]:
    """A row a search; takes `searches.search_cells`."""
    rows = [row for _, row in cells.iterrows()]
    varying_keys = [key for key in varying(cells, GROUP) if key not in ("objective", "corpus")]
    other = [key for key in varying(cells, TRAINING) if key != "learning_rate"]
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        *(each(cells, key.replace("_", " "), key, or_dash, right=False) for key in varying_keys),
        each(cells, "length", "seq_len", str, optional=False),
        *training_columns(cells, other),
        each(cells, "rate taken", "learning_rate", units.learning_rate, optional=False),
        Column("at the edge", [_edge(row) for row in rows], right=False, optional=False),
        Column("losses by rate, nats", [_losses(row) for row in rows], right=False, optional=False),
        each(cells, "to the next", "gap", units.digits, optional=False),
        each(cells, "noise", "noise", units.digits, optional=False),
        each(cells, "decided by", "decided", _decided, right=False, optional=False),
        each(cells, "replicates", "replicates", units.whole, optional=False),
    ]


def _losses(row: pd.Series[Any]) -> str:
    """'0.001: 5.849, 0.003: 5.301, 0.01: diverged'."""
    texts = ["diverged" if math.isnan(nll) else units.score(nll) for nll in row["nlls"]]
    pairs = zip(row["tried"], texts, strict=True)
    return ", ".join(f"{units.learning_rate(rate)}: {text}" for rate, text in pairs)


def _decided(decided: bool | None) -> str:
    return units.MISSING if pd.isna(decided) else "loss" if decided else "chance"


def _edge(row: pd.Series[Any]) -> str:
    """Whether a better rate may lie beyond those tried."""
    if pd.isna(row["learning_rate"]):
        return units.MISSING
    return f"{row['edge']} tried" if row["edge"] else "no"


def _listed(rates: list[float]) -> str:
    return ", ".join(units.learning_rate(rate) for rate in rates) or units.MISSING
