"""Cells that did not finish, with their reasons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import GROUP, SETTING, TRAINING, varying
from bench.report.sections import Section
from bench.report.text.cells import or_dash, training_columns
from bench.report.text.columns import Column, each
from bench.report.text.listing import Listed, PageList, listed
from bench.report.text.phrases import trained
from bench.report.text.tables import Table


class Failures(Section[pd.DataFrame]):
    """Its data are the current records of every kind."""

    name = "failures"
    order = 170
    title = "Did not finish"

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """All records: which keys differ among them decides the columns."""
        return records.collected.frame

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """One table; replicates with the same reason share a row."""
        columns = _columns(data)
        return [Table(columns)] if columns else []

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        """The same, with the training in words."""
        return [PageList("lost", "Did not finish", "What did not finish", _listed(data))]


def failed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a failure: the keys, `status`, `reason` and the replicates with the same reason, as text."""
    rows = frame[frame["status"] != "ok"]
    rows = rows.assign(reason=rows["reason"].fillna("no reason recorded"))
    keys = [*GROUP, *TRAINING, "label", "seq_len", "status", "reason"]
    groups = rows.groupby(keys, sort=True, dropna=False)["replicate"].agg(
        lambda v: ", ".join(str(r) for r in sorted(v))
    )
    return groups.reset_index()


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Every record that is not ok, with its reason; replicates with the same reason share a row."""
    table = failed(frame)
    if table.empty:
        return []
    varying_keys = [key for key in TRAINING if frame[key].nunique() > 1]
    return [
        each(table, "variant", "label", str, right=False, optional=False),
        each(table, "length", "seq_len", str, optional=False),
        each(table, "depth", "depth", str, optional=False),
        *(each(table, key, key, str, right=False) for key in varying(frame, SETTING)),
        *training_columns(table, varying_keys),
        each(table, "replicates", "replicate", str, optional=False),
        each(table, "status", "status", str, right=False, optional=False),
        each(table, "reason", "reason", or_dash, right=False, optional=False),
    ]


def _listed(frame: pd.DataFrame) -> Listed:
    rows = failed(frame).rename(columns={"replicate": "replicates"})
    varying_keys = varying(frame, SETTING)
    if any(frame[key].nunique() > 1 for key in TRAINING):
        rows["training"] = [trained(row) for _, row in rows.iterrows()]
        varying_keys = [*varying_keys, "training"]
    return listed(rows, ["label", "seq_len", "depth", *varying_keys, "replicates", "status", "reason"])


SECTIONS: Sequence[Section[Any]] = (Failures(),)
