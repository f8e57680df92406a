"""The rate of a training step as a share of the machine's best rate of a matrix product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import SETTING
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.utilisation.data import peaks, utilisation_cells
from bench.report.sections.utilisation.plots import utilisation
from bench.report.text import units
from bench.report.text.columns import each
from bench.report.text.tables import Table


@dataclass(frozen=True)
class Rates:
    """The machines' `peaks` and the `utilisation_cells`."""

    peaks: pd.DataFrame
    cells: pd.DataFrame


class Utilisation(Section[Rates]):
    """The peaks as a table, the utilisation as a figure."""

    name = "utilisation"
    order = 30
    title = "Utilisation"
    needs = ("cost",)
    lead = (
        "Algorithmic FLOPs of a step over its time, as a share of the best square matrix product that the "
        "machine was seen to do in the same type of numbers on the same threads. *copies*: bytes read plus "
        "bytes written."
    )
    figures_first = False

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Rates:
        """Peaks over all records of a machine; a share for each cell that was timed on one."""
        known = peaks(records.kinds.plain)
        return Rates(known, utilisation_cells(done["cost"], known))

    def tables(self, data: Rates) -> list[Table]:
        """One row a machine, its threads and type of numbers."""
        if data.peaks.empty:
            return []
        columns = [
            each(data.peaks, "machine", "machine", str, right=False, optional=False),
            each(data.peaks, "threads", "threads", str),
            each(data.peaks, "numbers", "dtype", str, right=False),
            each(data.peaks, "matrix products", "peak_flops_per_second", lambda v: f"{units.flops(v)}/s"),
            each(data.peaks, "copies", "peak_bytes_per_second", lambda v: f"{units.size(v)}/s"),
        ]
        return [Table(columns)]

    def figures(self, data: Rates) -> list[FigureSpec]:
        """Utilisation against length."""
        return [FigureSpec("utilisation", "Utilisation", data.cells, utilisation, SETTING)]


SECTIONS: Sequence[Section[Any]] = (Utilisation(),)
