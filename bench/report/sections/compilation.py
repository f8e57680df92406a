"""The effect of torch.compile: a cell's cost beside that of the same cell without it, and the compiler's own
time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records import NOT_COMPILED
from bench.report.data.experiment import Experiment
from bench.report.data.groups import CELL, GROUP
from bench.report.figures.style import ordered
from bench.report.sections import Section
from bench.report.text import units
from bench.report.text.columns import Column, each
from bench.report.text.marks import CONTAMINATED, meanings, timed
from bench.report.text.phrases import headed
from bench.report.text.tables import Table, first_open

_COMPARED = {
    "step_seconds_median": "step_seconds_ratio",
    "forward_seconds_median": "forward_seconds_ratio",
    "peak_bytes": "peak_bytes_ratio",
}
"""Figure → the column with its ratio to the cell without compilation."""
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
    median over replicates of the ratio to the cell without compilation (NaN where there is none)."""
    ok = frame[frame["status"] == "ok"]
    compiled = ok[ok["compile"] != NOT_COMPILED]
    if compiled.empty:
        return pd.DataFrame()
    peers = [key for key in (*CELL, "replicate") if key != "compile"]
    reference = ok[ok["compile"] == NOT_COMPILED].groupby(peers)[list(_COMPARED)].median()
    against = reference.reindex(pd.MultiIndex.from_frame(compiled[peers]))
    ratios = {
        ratio: compiled[figure].to_numpy() / against[figure].where(against[figure] > 0).to_numpy()
        for figure, ratio in _COMPARED.items()
    }
    compiled = compiled.assign(**ratios)
    groups = compiled.groupby(list(CELL), sort=False, dropna=False)
    cells = groups[[*_COMPARED, *ratios, *_OWN]].median()
    cells["replicates"] = groups["replicate"].nunique()
    cells["contaminated"] = groups["contaminated"].count()
    return ordered(cells.reset_index())


def _columns(cells: pd.DataFrame) -> list[Column]:
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        each(cells, "length", "seq_len", str, optional=False),
        each(cells, "compile", "compile", str, right=False, optional=False),
        Column(
            "step time", [timed(row, "step_seconds_median", units.seconds) for _, row in cells.iterrows()]
        ),
        each(cells, "/ off", "step_seconds_ratio", units.ratio),
        each(cells, "forward", "forward_seconds_median", units.seconds),
        each(cells, "/ off", "forward_seconds_ratio", units.ratio),
        each(cells, "peak memory", "peak_bytes", units.size),
        each(cells, "/ off", "peak_bytes_ratio", units.ratio),
        each(cells, "compiling", "compile_seconds", units.seconds),
        each(cells, "graph breaks", "graph_breaks", units.whole),
        each(cells, "recompiles", "recompiles", units.whole),
        each(cells, "replicates", "replicates", str),
    ]


SECTIONS: Sequence[Section[Any]] = (Compilation(),)
