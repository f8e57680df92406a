"""The gates: checks that run before anything is timed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records.configurations import UNKNOWN
from bench.report.data.collect import spoken
from bench.report.data.experiment import Experiment
from bench.report.data.groups import SLOT_COLUMNS, varying
from bench.report.data.statistics import LEAK_LIMIT, distinct
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.cells import label_of, or_dash
from bench.report.text.columns import Column, each
from bench.report.text.marks import LEAK, meanings
from bench.report.text.tables import Table


class Gates(Section[pd.DataFrame]):
    """Its data are the current records, with `leaks`."""

    name = "gates"
    order = 150
    title = "Gates"
    lead = (
        "What was checked before anything was timed, the worst over an experiment's records. *leak*: how "
        "far outputs before a cut move when the tokens after it change. *reference error*: how far the "
        "fast path is from the readable one. *counted / formula*: FLOPs that attention dispatched "
        "in a forward pass over those of the variant's formula."
    )
    marks = meanings(LEAK)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """All records, of every kind of cell."""
        frame = records.collected.frame
        return frame.assign(leaks=frame["leak_max_abs"] > LEAK_LIMIT)

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """One table."""
        return [Table(_columns(data))]


def _columns(frame: pd.DataFrame) -> list[Column]:
    """One row a variant configuration: the results of its gates, the worst over its records."""
    where = ["objective", "dtype", "device", *SLOT_COLUMNS.values()]
    found = frame.groupby([*where, "variant", "label", "params_json", "impl"], sort=True)
    table = pd.DataFrame(
        {
            "leak": found["leak_max_abs"].max(),
            "reference": found["reference_max_abs"].max(),
            "rounding": found["dtype_reference_rms"].max(),
            "row": found["dtype_reference_row_rms"].max(),
            "low": found["cost_ratio"].min(),
            "high": found["cost_ratio"].max(),
            "why": found["cost_ratio_reason"].agg(distinct),
            "leaks": found["leaks"].any(),
        }
    ).reset_index()
    rows = [row for _, row in table.iterrows()]
    cost_ratios = [units.ratios(row["low"], row["high"]) for row in rows]
    return [
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
        *(each(table, key, key, str, right=False) for key in varying(table, where)),
        Column("parameters", [_knobs(row) for row in rows], right=False),
        each(table, "leak (max abs)", "leak", units.scientific, optional=False),
        each(table, "reference error (max abs)", "reference", units.scientific, optional=False),
        each(table, "error in the dtype (rms)", "rounding", units.scientific),
        each(table, "of a row", "row", units.scientific),
        Column("counted / formula", cost_ratios, optional=False),
        each(table, "because", "why", or_dash, right=False),
    ]


def _knobs(row: pd.Series[Any]) -> str:
    knobs = json.loads(row["params_json"]) | ({} if row["impl"] == UNKNOWN else {"impl": row["impl"]})
    return ", ".join(f"{name}={spoken(value)}" for name, value in knobs.items()) or units.MISSING


SECTIONS: Sequence[Section[Any]] = (Gates(),)
