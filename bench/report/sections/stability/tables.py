"""Kendall's τ and fitted loss curves as tables."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.groups import BUDGET, GROUP, TRAINING, varying
from bench.report.data.loss_fit import FEWEST
from bench.report.text import units
from bench.report.text.cells import training_columns
from bench.report.text.columns import Column, each

NO_FIT = "too few budgets"


def _places(data: pd.DataFrame) -> list[Column]:
    """The keys that vary among the rows, and length and depth."""
    keys = varying(data, [key for key in GROUP if key != "depth"])
    return [
        *(each(data, key, key, str, right=False) for key in keys),
        each(data, "length", "seq_len", str, optional=False),
        each(data, "depth", "depth", str, optional=False),
        *training_columns(data, varying(data, [key for key in TRAINING if key in BUDGET])),
    ]


def tau(value: float) -> str:
    """τ with two decimals."""
    return units.MISSING if units.missing(value) else f"{value:.2f}".replace("-", "−")


def _between_budgets(row: pd.Series[Any]) -> str:
    words = [f"{tau(value)} after {units.count(size)}" for size, value in row["tau_budgets"]]
    return ", ".join(words) or units.MISSING


def orders(data: pd.DataFrame) -> list[Column]:
    """Of each pool, how stable its order is."""
    return [
        *_places(data),
        each(data, "models", "models", str, optional=False),
        each(data, "replicates", "replicates", str, optional=False),
        each(data, "τ between replicates", "tau_replicates", tau, optional=False),
        Column("τ to the largest budget", [_between_budgets(row) for _, row in data.iterrows()]),
    ]


def _exponent(row: pd.Series[Any]) -> str:
    if units.missing(row["exponent"]):
        return units.MISSING
    return f"{row['exponent']:.2f}" + (" (at a bound)" if row["at_bound"] else "")


def _predicted(row: pd.Series[Any]) -> str:
    if row["budgets"] < FEWEST:
        return f"{NO_FIT} ({row['budgets']})"
    return units.score(row["predicted"])


def _came(row: pd.Series[Any]) -> str:
    spread = "" if pd.isna(row["spread"]) else f" ± {row['spread']:.3f}"
    return units.score(row["came"]) + spread


def curves(data: pd.DataFrame) -> list[Column]:
    """Of each model its curve, and the prediction of the largest budget beside what came."""
    rows = [row for _, row in data.iterrows()]
    off = [units.difference(row["came"] - row["predicted"], None, None) for row in rows]
    return [
        each(data, "variant", "label", str, right=False, optional=False),
        *_places(data),
        *training_columns(data, varying(data, ["learning_rate"])),
        each(data, "budgets", "budgets", str, optional=False),
        each(data, "E", "floor", units.score),
        each(data, "A", "scale", units.score),
        Column("α", [_exponent(row) for row in rows]),
        each(data, "largest", "largest", units.count, optional=False),
        Column("predicted", [_predicted(row) for row in rows], optional=False),
        Column("came", [_came(row) for row in rows], optional=False),
        Column("came − predicted", off),
    ]
