"""Longer than trained: trained models on longer sequences, and with longer memories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import SETTING
from bench.report.data.kinds import with_lists
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.longer.data import TOLERANCE, longer_cells
from bench.report.sections.longer.plots import by_position
from bench.report.sections.longer.tables import lengths, memories
from bench.report.text.listing import PageList, listed_tables
from bench.report.text.marks import LEAK, OF_TWO, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table

HEADING = ("corpus", "d_model", "heads")
NAME = "Longer than trained"


@dataclass(frozen=True)
class LongerData:
    """The `longer_cells`, and the records that have a loss by position."""

    cells: pd.DataFrame
    records: pd.DataFrame


class Longer(Section[LongerData]):
    """Empty where no cell was evaluated on longer sequences."""

    name = "longer"
    order = 105
    title = NAME
    lead = (
        "A model is trained on sequences of one length, and then reads sequences that are 2, 4, … times as "
        "long. Bits per byte at each length are of the same targets, the last ones of each sequence, so "
        "that a difference comes from the length alone. In parentheses is the difference to the trained "
        "length: above 0 the model is worse on longer sequences, below 0 it uses the longer context. ± is "
        "half the width of its 95 % interval, over text and replicates. The *verdict* says what these "
        f"intervals show; differences of up to {TOLERANCE:g} bits per byte count as equal. "
        "*positions*: how the variant tells tokens their places. *rotary*: queries and keys are rotated by "
        "an angle that grows with the position; *relative*: the score has terms of "
        "the distance; *sinusoidal*: fixed vectors are added to the inputs; *learnt*: one learnt vector for "
        "each place; *none*: only the order in which tokens are read. Positions that restart are never "
        "larger than the window in which they restart."
    )
    marks = meanings(LEAK, OF_TWO)
    csv = ("longer",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> LongerData:
        """One row a cell and length or memory."""
        frame = records.kinds.plain
        drawn = with_lists(frame, "nll_longer_by_position", "longer_lengths")
        return LongerData(longer_cells(frame), drawn)

    def tables(self, data: LongerData) -> list[Table]:
        """For each data set and model size a table of lengths, and one of memories if there are any."""
        tables = []
        for _, heading, group in headed(data.cells, HEADING) if len(data.cells) else ():
            if columns := lengths(group):
                tables.append(Table(columns, heading, caption=f"{NAME}: {heading}. Bits per byte"))
            if columns := memories(group):
                tables.append(Table(columns, f"Longer memory at test: {heading}", note=MEMORY_NOTE))
        return tables

    def figures(self, data: LongerData) -> list[FigureSpec]:
        """Loss by position."""
        return [FigureSpec("longer_by_position", NAME, data.records, by_position, SETTING)]

    def csv_tables(self, data: LongerData) -> dict[str, pd.DataFrame]:
        """The cells."""
        return {"longer": data.cells} if len(data.cells) else {}

    def page_lists(self, data: LongerData) -> list[PageList]:
        """The same tables."""
        return listed_tables("longer", NAME, self.tables(data))


MEMORY_NOTE = (
    "The trained model, unchanged, reads the longest sequences with the memory of training and with 2 and "
    "4 times as much, as in Dai et al. 2019 (arXiv:1901.02860, §4). In parentheses is the difference to "
    "the memory of training. A compressed memory is one position."
)

SECTIONS: Sequence[Section[Any]] = (Longer(),)
