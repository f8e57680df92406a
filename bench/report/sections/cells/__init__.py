"""One row per cell with cost and quality: summary.csv, and the page's chooser, table and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.statistics import summary
from bench.report.figures.chart_data import Json
from bench.report.sections import Section
from bench.report.sections.cells.data import Cells, best_trained
from bench.report.sections.cells.page import document
from bench.report.sections.cost.charts import cost_figures


class EveryCell(Section[Cells]):
    """The cells that the reader sorts, filters and chooses from."""

    name = "cells"
    order = 10
    needs = ("cost", "quality")
    csv = ("summary",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Cells:
        """Cost and quality, joined by cell."""
        cost, quality = done["cost"], done["quality"].cells
        return Cells(summary(cost, quality), best_trained(cost, quality))

    def csv_tables(self, data: Cells) -> dict[str, pd.DataFrame]:
        """A row a cell and training; the file is there even if no cell is an ordinary one."""
        return {"summary": data.summary}

    def page_data(self, data: Cells) -> Json:
        """See `document`."""
        return document(data)

    def page_charts(self, data: Cells) -> dict[str, list[Json]]:
        """Cost against length, with one entry a row."""
        return {"figures": cost_figures(data.rows)}


SECTIONS: Sequence[Section[Any]] = (EveryCell(),)
