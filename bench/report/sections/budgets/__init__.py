"""The sizes that fit into a memory budget, and whether saved memory increases speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import FIT, PAYOFF
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.budgets import plots, tables
from bench.report.sections.budgets.data import fits_cells, payoff_cells
from bench.report.sections.budgets.lists import listed_fits, listed_payoff
from bench.report.text.columns import Column
from bench.report.text.listing import PageList
from bench.report.text.marks import CONTAMINATED, OF_TWO, PREDICTED, meanings
from bench.report.text.phrases import describe, headed
from bench.report.text.tables import Table


class Fits(Section[pd.DataFrame]):
    """Data: `fits_cells` of the records that search for the sizes that fit."""

    name = "fits"
    order = 80
    title = "What fits"
    lead = (
        "The longest sequence at the given batch, and the largest batch at the given length, whose training "
        "step fits into the budget: found by prediction, to within 1 %, nothing is run. ≥ marks where the "
        "search ends."
    )
    csv = ("fits",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a depth, variant and strategy."""
        return fits_cells(records.kinds.fits)

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a budget, length and batch."""
        return _by_budget(data, FIT, tables.fits)

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """The longest sequence for each batch that was given, the largest batch for each length."""
        given_batch = [key for key in FIT if key != "seq_len"]
        longest, largest = "The longest sequence that fits", "The largest batch that fits"
        return [
            FigureSpec(
                "longest_sequence",
                longest,
                data,
                plots.longest,
                given_batch,
                "fits",
                front=True,
                all_variants=True,
            ),
            FigureSpec("largest_batch", largest, data, plots.largest, PAYOFF, "fits", all_variants=True),
        ]

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        """The same for all budgets together."""
        lead = (
            "The longest sequence at the given batch, and the largest batch at the given length, whose "
            "training step fits into the budget: found by prediction, nothing is run. ≥ marks where the "
            "search ends."
        )
        return [PageList("fits", "What fits", "What fits", listed_fits(data), lead)]


class Payoff(Section[pd.DataFrame]):
    """Its data are `payoff_cells` of the records whose batch is the largest that fits."""

    name = "payoff"
    order = 90
    title = "Batch payoff"
    lead = (
        "Does saved memory buy speed? Throughput at the largest batch that is predicted to fit into the "
        "budget. Figures are medians over replicates, */ keep* the median of the ratio within a replicate."
    )
    marks = meanings(OF_TWO, CONTAMINATED, PREDICTED)
    csv = ("payoff",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a depth, variant and strategy."""
        found = records.kinds.payoff
        return payoff_cells(found) if len(found) else found

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a budget, length and depth."""
        return _by_budget(data, (*PAYOFF, "depth"), tables.payoff)

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """Throughput and its gain."""
        title = "Throughput at the largest batch that fits"
        return [FigureSpec("batch_payoff", title, data, plots.payoff, PAYOFF, "payoff", all_variants=True)]

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        """The same for all budgets together."""
        if data.empty:
            return []
        lead = (
            "Throughput at the largest batch that is predicted to fit into the budget: medians over "
            "replicates; / keep is the median of the ratio within a replicate."
        )
        return [PageList("payoff", "Batch payoff", "Batch payoff", listed_payoff(data), lead)]


def _by_budget(
    cells: pd.DataFrame, keys: Sequence[str], show: Callable[[pd.DataFrame], list[Column]]
) -> list[Table]:
    """A table for each value of the keys, with the budget and the length in every heading."""
    if cells.empty:
        return []
    tables = []
    for heading, words, group in headed(cells, keys):
        fixed = [k for k in ("budget_bytes", "seq_len") if cells[k].nunique() == 1]
        first = {k: group[k].iloc[0] for k in fixed}
        whole = ", ".join(w for w in (heading, describe(first, fixed)) if w)
        tables.append(Table(show(group), whole, setting=words))
    return tables


SECTIONS: Sequence[Section[Any]] = (Fits(), Payoff())
