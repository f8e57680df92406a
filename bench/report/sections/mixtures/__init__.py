"""Mixtures of dense and other layers: what each figure is at each share of dense layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import split
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.mixtures.data import PAGE, mixture_points, panels
from bench.report.sections.mixtures.plots import draw
from bench.report.sections.mixtures.sources import BATCH, STATE, TOKEN
from bench.report.sections.mixtures.tables import by_share, places
from bench.report.text.listing import PageList, listed_columns
from bench.report.text.marks import ALIKE, CONTAMINATED, LEAK, NO_BASELINE, UNDERTRAINED, UNTOLD, meanings
from bench.report.text.phrases import describe
from bench.report.text.tables import Table

SAME = (
    "not called different from dense: by its corrected comparison in differences.csv, or by the interval of "
    "its ratio"
)


MARKS = {
    **meanings(LEAK, UNDERTRAINED, NO_BASELINE, CONTAMINATED),
    ALIKE: SAME,
    UNTOLD: "nothing says whether it differs from dense",
}


class Mixtures(Section[pd.DataFrame]):
    """Its data are `mixture_points`."""

    name = "mixtures"
    order = 115
    title = "Mixtures"
    needs = ("cost", "decoding", "quality", "recall")
    lead = (
        "Mixtures of dense and cheaper layers (`variant=hybrid`), by the share of layers that are dense. At "
        "0 % the other variant is in every layer; 100 % is `dense`, the end of every line. *layers* are one "
        "period, from the lowest layer on, in the form that `variant.layers` takes. Each figure is of the "
        "setting that has most mixtures, with the most training and the longest length; mixtures.csv has "
        "all. Bits per byte and accuracy are means ± standard deviations over replicates. *− dense* is the "
        "difference in bits per byte with its 95 % interval, as in the section *Quality*. The grey band "
        "around dense in the plot is what a difference must exceed: half the widest of these intervals, and "
        "of the time of a step the noise floor."
    )
    marks = MARKS
    csv = ("mixtures",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """A row a figure, setting and model; empty where no mixture has two shares."""
        return mixture_points(records.collected.frame, done)

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a machine and depth, with the figures that are drawn."""
        if data.empty:
            return []
        found = []
        for values, part in split(data, PAGE):
            shown = panels(part)
            keys = [key for key in PAGE if key == "depth" or data[key].nunique() > 1]
            heading = f"Mixtures, {describe(values, keys)}"
            found.append(Table(by_share(shown), heading, note=places(shown), caption=heading))
        return found

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """A panel a figure that was measured."""
        title = "Mixtures by their share of dense layers"
        spec = FigureSpec("mixtures", title, data, draw, PAGE, all_variants=True)
        figures = set() if data.empty else {*data["figure"]}
        decoded_only = figures <= {STATE, TOKEN, BATCH} and TOKEN in figures
        return [replace(spec, kind="decoding") if decoded_only else spec]

    def page_lists(self, data: pd.DataFrame) -> list[PageList]:
        """The same tables."""
        return [
            PageList(f"mixtures-{place}", own.heading, own.heading, listed_columns(own.columns), own.note)
            for place, own in enumerate(self.tables(data), 1)
        ]


SECTIONS: Sequence[Section[Any]] = (Mixtures(),)
