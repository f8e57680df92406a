"""Generating with each variant: the prompt, each token after it, and the state in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import GROUP, SETTING, SLOT_COLUMNS
from bench.report.figures.chart_data import Json
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.decoding import plots, tables
from bench.report.sections.decoding.data import cheaper_from, combinations, decoding_cells
from bench.report.sections.decoding.page import generating
from bench.report.text.listing import PageList, listed_tables
from bench.report.text.markdown import plain
from bench.report.text.marks import CONTAMINATED, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table, first_open


@dataclass(frozen=True)
class Generation:
    """The `decoding_cells`, and where a token is `cheaper_from`."""

    cells: pd.DataFrame
    crossings: pd.DataFrame


class Decoding(Section[Generation]):
    """Of the cells that measured decoding."""

    name = "decoding"
    order = 55
    title = "Decoding"
    lead = (
        "A prompt that fills the context, then tokens one by one. *Time a token*: the median step of the "
        "whole batch, with one synchronisation for each token; *a token of a block*: the time of a block "
        "that is read in one step, over its tokens. *State*: bytes that all layers hold, allocated at the "
        "start. *Bytes moved* and *launches*: of the step of one token. *Of the copy rate*: the bytes moved "
        "a second, over those of a copy in the device's memory, the most that a step can reach. "
        "*Largest batch*: predicted to fit into the budget. Ratios to `dense` are medians of the ratio "
        "within a replicate. *Speed-up*, where models differ in more than their variant: the time a token of "
        "`dense` with the usual layers in all slots, over that of the row."
    )
    marks = meanings(CONTAMINATED)
    csv = ("decoding",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Generation:
        """Cells of all kinds: a budget is only one more figure here."""
        cells = decoding_cells(records.kinds.decoding)
        return Generation(cells, cheaper_from(cells))

    def tables(self, data: Generation) -> list[Table]:
        """Speed-ups of combined layers; then two tables a setting and depth: costs, and from which context on
        a token is cheaper."""
        combined, found = combinations(data.cells), []
        if len(combined):
            keys = [key for key in GROUP if key not in SLOT_COLUMNS.values()]
            found += first_open(
                Table(tables.combinations(own), f"Combined layers: {heading}", setting=setting)
                for heading, setting, own in headed(combined, keys)
            )
        for cells, show in ((data.cells, tables.tokens), (data.crossings, tables.crossings)):
            if len(cells):
                groups = headed(cells, GROUP)
                found += first_open(Table(show(own), heading, setting=keys) for heading, keys, own in groups)
        return found

    def figures(self, data: Generation) -> list[FigureSpec]:
        """Costs of one sequence, and of the largest batch."""
        cells = data.cells
        return [
            FigureSpec("decoding", "Decoding", cells, plots.costs, SETTING, "decoding", front=True),
            FigureSpec("decoding_batch", "Decoding in batches", cells, plots.batches, SETTING, "decoding"),
        ]

    def csv_tables(self, data: Generation) -> dict[str, pd.DataFrame]:
        """The cells, if there are any."""
        return {"decoding": data.cells} if len(data.cells) else {}

    def page_data(self, data: Generation) -> Json:
        """See `generating`."""
        return {"generating": generating(data.cells)} if len(data.cells) else {}

    def page_lists(self, data: Generation) -> list[PageList]:
        """The same tables."""
        return listed_tables("decoding", self.title, self.tables(data), plain(self.lead))


SECTIONS: Sequence[Section[Any]] = (Decoding(),)
