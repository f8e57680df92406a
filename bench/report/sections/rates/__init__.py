"""Searches over learning rates: by a sweep over them, and within cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import SETTING
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.rates.data import rate_cells
from bench.report.sections.rates.plots import by_rate
from bench.report.sections.rates.searches import search_cells
from bench.report.sections.rates.tables import rates, searches
from bench.report.text.marks import LEAK, NO_BASELINE, UNDERTRAINED, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table

KEYS = ("objective", "corpus", "d_model", "heads")
"""Keys of one table."""


class Rates(Section[pd.DataFrame]):
    """Its data are `rate_cells`; empty where no cell was trained at several rates."""

    name = "rates"
    order = 120
    title = "Learning rates"
    needs = ("quality",)
    lead = (
        "Each variant's best learning rate of those tried: that of the least mean loss over replicates, none "
        "of which diverged. Where it is the lowest or the highest tried, a better one may lie beyond. On the "
        "split *validation* it is chosen on text that a comparison does not score."
    )
    marks = meanings(LEAK, UNDERTRAINED, NO_BASELINE)
    csv = ("rates",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a rate of every search."""
        return rate_cells(records.kinds.plain, done["quality"].cells)

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a data set and model size."""
        groups = headed(data, KEYS) if len(data) else ()
        return [Table(rates(group), heading) for _, heading, group in groups]

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """Quality against the rate."""
        return [FigureSpec("learning_rates", "Quality by learning rate", data, by_rate, SETTING)]


class Searches(Section[pd.DataFrame]):
    """Its data are `search_cells`; empty where no cell searched its rate."""

    name = "searches"
    order = 121
    title = "Searched learning rates"
    lead = (
        "The rate that `measure.learning_rate=search` took for each model, and the losses on the validation "
        "split, with seed 0, by which it was taken. *to the next* is how much larger the second least loss "
        "is, *noise* what two trainings with different seeds differ by (√2 standard deviations of the final "
        "loss over replicates). Where the noise is larger, chance decided: the two rates may be equally "
        "good, or the search may have been too short to tell them apart "
        "(`measure.search_budget=largest` tries each rate with the whole training)."
    )
    csv = ("searches",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a search."""
        return search_cells(records.kinds.plain)

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a data set and model size."""
        groups = headed(data, KEYS) if len(data) else ()
        return [Table(searches(group), heading) for _, heading, group in groups]


SECTIONS: Sequence[Section[Any]] = (Rates(), Searches())
