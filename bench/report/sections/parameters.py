"""Parameter counts of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import SLOT_COLUMNS, varying
from bench.report.data.statistics import DRIFT_LIMIT
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.columns import Column, each
from bench.report.text.marks import DRIFT, meanings
from bench.report.text.tables import Table


class Parameters(Section[pd.DataFrame]):
    """Its data are the cost cells."""

    name = "parameters"
    order = 140
    title = "Parameters"
    needs = ("cost",)
    marks = meanings(DRIFT)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """The cost cells as they are."""
        cells: pd.DataFrame = done["cost"]
        return cells

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """One table."""
        columns = _columns(data)
        return [Table(columns)] if columns else []


def _columns(cells: pd.DataFrame) -> list[Column]:
    """Parameter counts, one row a variant and model; lengths share a row where they share a count. Where a
    token computes with a part of a model's parameters, these have a column."""
    known = cells[cells["params"].notna()]
    keys = ["objective", "corpus", "d_model", "heads", *SLOT_COLUMNS.values(), "depth"]
    found = known.groupby([*keys, "variant", "label", "params"], sort=False)
    table = pd.DataFrame(
        {
            "params_ratio": found["params_ratio"].median(),
            "active": found["params_active"].median(),
            "lengths": found["seq_len"].agg(_lengths),
        }
    ).reset_index()
    if table.empty:
        return []
    drift = [DRIFT if abs(value - 1) > DRIFT_LIMIT else "" for value in table["params_ratio"]]
    ratios = [units.ratio(v) + mark for v, mark in zip(table["params_ratio"], drift, strict=True)]
    parts = table["active"].notna() & (table["active"] != table["params"])
    active = [units.MISSING if pd.isna(value) else f"{int(value):,}" for value in table["active"]]
    names = {"d_model": "width", "feed_forward_layer": "feed-forward", "depth_schedule": "depth schedule"}
    return [
        each(table, "variant", "label", str, right=False, optional=False),
        *(each(table, names.get(k, k), k, str) for k in keys if k in varying(table, keys)),
        Column("parameters", [f"{int(value):,}" for value in table["params"]]),
        *([Column("active", active)] if parts.any() else []),
        Column("/ dense", ratios),
        each(table, "lengths", "lengths", str, right=False),
    ]


def _lengths(values: pd.Series[Any]) -> str:
    return ", ".join(str(v) for v in sorted(values.unique()))


SECTIONS: Sequence[Section[Any]] = (Parameters(),)
