"""The length from which on a variant is cheaper than dense attention, and its loss of quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import GROUP, SETTING
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.crossover.data import compared, crossovers, quality_loss
from bench.report.sections.crossover.plots import crossover
from bench.report.sections.crossover.tables import crossings
from bench.report.text.marks import CONTAMINATED, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table, first_open


@dataclass(frozen=True)
class Crossings:
    """The `compared` cells, with their ratios to dense, and the `crossovers` of these."""

    compared: pd.DataFrame
    crossovers: pd.DataFrame


class Crossover(Section[Crossings]):
    """Ratios to dense against length, and the lengths at which they pass 1."""

    name = "crossover"
    order = 50
    title = "Crossover"
    needs = ("cost",)
    lead = (
        "The length from which on a variant is cheaper than `dense` in the same setting, up to the longest "
        "measured: read off the line through the logarithms of the ratios at measured lengths. A ratio is "
        "the median over replicates, each to dense as in *Cost*. In brackets, of times, the 95 % interval "
        "of that length, by a bootstrap: each repeat moves all ratios by noise, that between rounds or that "
        "of the noise floor, whichever is larger. *loss over dense*: nats a token that the model loses after "
        "the same training, with the 95 % interval over replicates (of two their range), at the trained "
        "length nearest to the crossover in time; none if either is undertrained."
    )
    marks = meanings(CONTAMINATED)
    csv = ("crossovers",)
    figures_alone = False

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Crossings:
        """Ratios from the cost cells, losses from the records."""
        cost = done["cost"]
        return Crossings(compared(cost), crossovers(cost, quality_loss(records.kinds.plain)))

    def tables(self, data: Crossings) -> list[Table]:
        """A table a setting and depth."""
        if data.crossovers.empty:
            return []
        groups = headed(data.crossovers, GROUP)
        return first_open(Table(crossings(own), heading, setting=keys) for heading, keys, own in groups)

    def figures(self, data: Crossings) -> list[FigureSpec]:
        """Ratios against length."""
        return [FigureSpec("crossover", "Cost over dense's", data.compared, crossover, SETTING, front=True)]

    def csv_tables(self, data: Crossings) -> dict[str, pd.DataFrame]:
        """The crossovers, if there are any."""
        return {"crossovers": data.crossovers} if len(data.crossovers) else {}


SECTIONS: Sequence[Section[Any]] = (Crossover(),)
