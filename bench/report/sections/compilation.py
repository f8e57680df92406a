"""The effect of torch.compile: a cell's cost beside that of the same cell without it, and the compiler's own
time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records import NOT_COMPILED
from bench.report.data.disturbed import RATIO_DISTURBED, marked, undisturbed_medians, with_ratios
from bench.report.data.experiment import Experiment
from bench.report.data.groups import CELL, GROUP
from bench.report.figures.style import ordered
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.columns import Column, each
from bench.report.text.marks import CONTAMINATED, disturbed, meanings, timed
from bench.report.text.phrases import headed
from bench.report.text.tables import Table, first_open

_COMPARED = {
    "step_seconds_median": "step_seconds_ratio",
    "forward_seconds_median": "forward_seconds_ratio",
    "peak_bytes": "peak_bytes_ratio",
}
"""Figure → the column with its ratio to the cell without compilation."""
_TIMED = ("step_seconds_median", "forward_seconds_median")
_OWN = ("compile_seconds", "graph_breaks", "recompiles")
_SETTING = [key for key in GROUP if key != "compile"]


class Compilation(Section[pd.DataFrame]):
    """Its data: a row a compiled cell, with medians over replicates and ratios within a replicate."""

    name = "compilation"
    order = 37
    title = "Compilation"
    lead = (
        "*/ off*: the median over replicates of the ratio to the same cell without compilation, in the same "
        "replicate. *compiling*: the time of the first steps beyond that of later ones, with an empty cache; "
        "it is not part of the step time. *graph breaks*: places where the compiler left the code to Python. "
        "*recompiles*: functions compiled again, for other shapes, states or layers."
    )
    csv = ("compilation",)
    marks = meanings(CONTAMINATED)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """The finished cells that were compiled."""
        return compiled_cells(records.kinds.plain)

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a setting and depth."""
        if data.empty:
            return []
        return first_open(
            Table(_columns(group), heading=heading, setting=keys)
            for heading, keys, group in headed(data, _SETTING)
        )


def compiled_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a finished compiled cell. Columns: the keys, medians of the figures and, as `*_ratio`, the
    median over replicates of the ratio to the cell without compilation (NaN where there is none). Disturbed
    times take part where a cell has no others: `disturbed`, `ratio_disturbed`."""
    ok = marked(frame[frame["status"] == "ok"])
    compiled = ok[ok["compile"] != NOT_COMPILED]
    if compiled.empty:
        return pd.DataFrame()
    peers = [key for key in (*CELL, "replicate") if key != "compile"]
    reference = ok[ok["compile"] == NOT_COMPILED]
    compiled = with_ratios(compiled, reference, peers, _COMPARED)
    cells = undisturbed_medians(compiled, list(CELL), _COMPARED, timed=_TIMED)
    groups = compiled.groupby(list(CELL), sort=False, dropna=False)
    cells[list(_OWN)] = groups[list(_OWN)].median()
    cells["replicates"] = groups["replicate"].nunique()
    return ordered(cells.reset_index())


def _columns(cells: pd.DataFrame) -> list[Column]:
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        each(cells, "length", "seq_len", str, optional=False),
        each(cells, "compile", "compile", str, right=False, optional=False),
        Column(
            "step time", [timed(row, "step_seconds_median", units.seconds) for _, row in cells.iterrows()]
        ),
        _ratio(cells, "step_seconds_ratio"),
        Column(
            "forward", [timed(row, "forward_seconds_median", units.seconds) for _, row in cells.iterrows()]
        ),
        _ratio(cells, "forward_seconds_ratio"),
        each(cells, "peak memory", "peak_bytes", units.size),
        each(cells, "/ off", "peak_bytes_ratio", units.ratio),
        each(cells, "compiling", "compile_seconds", units.seconds),
        each(cells, "graph breaks", "graph_breaks", units.whole),
        each(cells, "recompiles", "recompiles", units.whole),
        each(cells, "replicates", "replicates", str),
    ]


def _ratio(cells: pd.DataFrame, column: str) -> Column:
    """Ratios of times to the same cell without compilation, with their mark."""
    texts = [disturbed(row, column, units.ratio, RATIO_DISTURBED) for _, row in cells.iterrows()]
    return Column("/ off", texts)


SECTIONS: Sequence[Section[Any]] = (Compilation(),)
