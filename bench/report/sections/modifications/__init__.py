"""Modifications of one model: what each costs and brings, task by task, and whether that transfers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import split
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.modifications import tables
from bench.report.sections.modifications.data import PAGE, modification_cells
from bench.report.sections.modifications.plots import TITLE, draw
from bench.report.sections.modifications.transfer import transfers
from bench.report.text.listing import PageList, listed_columns
from bench.report.text.marks import (
    ALIKE,
    BY_CHANCE,
    CONTAMINATED,
    GUESSES,
    LEAK,
    NO_BASELINE,
    UNDERTRAINED,
    UNTOLD,
    meanings,
)
from bench.report.text.phrases import describe
from bench.report.text.tables import Table

MARKS = {
    **meanings(LEAK, UNDERTRAINED, NO_BASELINE, CONTAMINATED),
    GUESSES: "no better than guessing, by a 95 % interval over the questions: all such models share a rank",
    ALIKE: "not called different from the default: by Holm's correction over the modifications of the task",
    BY_CHANCE: "chance chose this rate: in the search, the loss with the next best is larger by less than "
    "two trainings differ by (see *Searched learning rates*)",
    UNTOLD: "nothing says whether it differs from the default: a difference needs two replicates",
}
CORRELATIONS = (
    "Spearman's rank correlation ρ of the final figures of the modifications on two tasks, without the "
    "default and what has no rank: 1 is the same order, 0 is no relation. The 95 % interval is over "
    "modifications: it says what others of their kind would give. *Itself, another replicate* is the mean ρ "
    "between two replicates of one task: a task whose order another seed does not repeat cannot agree with "
    "another task either."
)


@dataclass(frozen=True)
class Modified:
    """`data.modification_cells` and `transfer.transfers`."""

    cells: pd.DataFrame
    transfers: pd.DataFrame


class Modifications(Section[Modified]):
    """Models with different slots or options, against the one with the usual ones. A run that has them was
    made to compare them, so the section is part of the answer."""

    name = "modifications"
    order = 118
    title = "Modifications"
    front = True
    needs = ("cost", "quality", "searches")
    lead = (
        "Each model differs from the *default* in what its name says; hidden widths that were changed to "
        "make models equally large are not named. Final figures are means ± standard deviations over "
        "replicates, at the best learning rate of each model. In the first table *parameters*, *FLOPs a "
        "token* (of a training step, by the formulas) and *steps a second* are ratios to the default, from "
        "the least to the most over the tasks, and *mean rank* is the mean of the ranks among all models of "
        "each task. The tables of single tasks have the figures themselves; *− default* is the difference "
        "with its 95 % interval over replicates, and over text where losses by block are known, which holds "
        "for this row alone; of accuracies it is in percentage points."
    )
    marks = MARKS
    csv = ("modifications", "transfer")

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Modified:
        """A row a task and model; empty where no task has several combinations of slots."""
        cells = modification_cells(records.kinds.plain, done["cost"], done["quality"].cells, done["searches"])
        return Modified(cells, transfers(cells))

    def tables(self, data: Modified) -> list[Table]:
        """All tasks side by side, the correlations, and a folded table a task."""
        found, each = [], []
        for where, own in split(data.cells, PAGE) if len(data.cells) else ():
            place = describe(where, PAGE) if data.cells[list(PAGE)].drop_duplicates().shape[0] > 1 else ""
            of = f", {place}" if place else ""
            heading = f"Modifications by task{of}"
            found.append(Table(tables.overview(own), heading, caption=heading))
            pairs = data.transfers
            if len(pairs):
                pairs = pairs[(pairs[list(PAGE)] == pd.Series(where)).all(axis=1)]
            if len(pairs):
                heading = f"From task to task{of}"
                found.append(Table(tables.correlations(pairs), heading, CORRELATIONS, caption=heading))
            for _, task in own.groupby("pool", sort=False):
                heading = f"Modifications on {task['task'].iloc[0]}{of}"
                columns = tables.of_task(task)
                each.append(Table(columns, heading, note=tables.family(task), folded=True, caption=heading))
        return [*found, *each]

    def figures(self, data: Modified) -> list[FigureSpec]:
        """A panel a pair of tasks."""
        return [FigureSpec("transfer", TITLE, data.cells, draw, PAGE, front=True, all_variants=True)]

    def csv_tables(self, data: Modified) -> dict[str, pd.DataFrame]:
        """The cells, and the correlations."""
        if data.cells.empty:
            return {}
        found = {"modifications": data.cells.drop(columns="by_replicate")}
        return found | ({"transfer": data.transfers} if len(data.transfers) else {})

    def page_lists(self, data: Modified) -> list[PageList]:
        """The same tables."""
        return [
            PageList(
                f"modifications-{place}",
                self.title if place == 1 else own.heading,
                own.heading,
                listed_columns(own.columns),
                own.note,
            )
            for place, own in enumerate(self.tables(data), 1)
        ]


SECTIONS: Sequence[Section[Any]] = (Modifications(),)
