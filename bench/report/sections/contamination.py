"""Cells whose samples something else disturbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import GROUP, varying
from bench.report.sections import Section
from bench.report.text.cells import or_dash
from bench.report.text.columns import Column, each
from bench.report.text.listing import Listed, PageList, listed
from bench.report.text.marks import CONTAMINATED
from bench.report.text.tables import Table


class Contamination(Section[pd.DataFrame]):
    """Its data are the current records of every kind."""

    name = "contamination"
    order = 160
    title = "Contaminated"

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """All records: which keys differ among them decides the columns."""
        return records.collected.frame

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """One table."""
        columns = _columns(data)
        return [Table(columns)] if columns else []

    def warnings(self, data: pd.DataFrame) -> list[str]:
        """That there are such cells."""
        count = len(disturbed(data))
        cells = f"{count} cell{'s' if count > 1 else ''}"
        words = f"{cells} timed while something else ran: contaminated, {CONTAMINATED} in the tables"
        return [words] if count else []

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        """The same table, next to the noise of the machine."""
        lead = "Timed while something else ran."
        cells = _listed(data)
        return [PageList("contaminated", "Contaminated", "Contaminated cells", cells, lead, about_noise=True)]


def _columns(frame: pd.DataFrame) -> list[Column]:
    """Every finished record whose samples another process disturbed, with the reason."""
    contaminated = disturbed(frame)
    if contaminated.empty:
        return []
    contaminated = contaminated.sort_values([*GROUP, "label", "seq_len", "replicate"])
    varying_keys = [key for key in varying(frame, GROUP) if key != "depth"]
    return [
        each(contaminated, "variant", "label", str, right=False, optional=False),
        each(contaminated, "length", "seq_len", str, optional=False),
        each(contaminated, "depth", "depth", str, optional=False),
        *(each(contaminated, key, key, str, right=False) for key in varying_keys),
        each(contaminated, "replicate", "replicate", str, optional=False),
        each(contaminated, "because", "contaminated", or_dash, right=False, optional=False),
    ]


def disturbed(frame: pd.DataFrame) -> pd.DataFrame:
    """The finished records whose samples something else disturbed."""
    return frame[(frame["status"] == "ok") & frame["contaminated"].notna()]


def _listed(frame: pd.DataFrame) -> Listed:
    rows = disturbed(frame).sort_values([*GROUP, "label", "seq_len", "replicate"])
    rows = rows.assign(because=rows["contaminated"])
    varying_keys = [key for key in varying(frame, GROUP) if key != "depth"]
    return listed(rows, ["label", "seq_len", "depth", *varying_keys, "replicate", "because"])


SECTIONS: Sequence[Section[Any]] = (Contamination(),)
