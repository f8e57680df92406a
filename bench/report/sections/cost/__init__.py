"""The cost of a training step: time, memory and FLOPs, by length and by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.compared_time import DEVICE, SOURCE
from bench.report.data.experiment import Experiment
from bench.report.data.groups import SETTING
from bench.report.data.kinds import KEEP
from bench.report.data.noise_floor import floors
from bench.report.data.ratios import MEASURED
from bench.report.data.statistics import BASELINE, cost_cells
from bench.report.figures.spec import FigureSpec, one_point
from bench.report.sections import Section
from bench.report.sections.cost.plots import BY_DEPTH, BY_LENGTH
from bench.report.sections.cost.tables import cost
from bench.report.text.marks import LAUNCH_BOUND, LEAK, MATH, OF_INTERVALS, PREDICTED, SHORT, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table


class Cost(Section[pd.DataFrame]):
    """Its data are `statistics.cost_cells` of the ordinary cells."""

    name = "cost"
    order = 20
    title = "Cost"
    lead = (
        "A step is one forward and backward over batch × length tokens. Figures are medians over replicates, "
        "each replicate a process of its own. *time / dense*: each measurement over dense in the same "
        "replicate, the geometric mean of its last measurement before and its first after, or the only one; "
        "then the median over replicates. Disturbed measurements are left out where a cell has others. The "
        "95 % interval is Student's t of the logarithms. A ratio without ≈ has both ends of its interval "
        "outside the noise floor, and passes Holm's correction over all ratios in this report: at most one "
        "report in twenty calls any cell different that is as fast as dense. *sampled within*: half-width of "
        "the 95 % interval of the median step within a process. *forward*: a pass without gradients over the "
        "same tokens, the wall-clock time of reading a text. *algorithmic* FLOPs count the pairs a "
        "pattern allows, *executed* what was dispatched, recomputation and padding included, *attention* the "
        "algorithmic part that is not a projection, feed-forward or output layer. *launches* are dispatched "
        "operations that compute something, *bytes moved* their tensor arguments and results."
    )
    marks = meanings(LEAK, *OF_INTERVALS, SHORT, LAUNCH_BOUND, MATH, PREDICTED)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """The cost cells; whether two differ is judged by the machine's noise floor."""
        return cost_cells(records.kinds.plain, floors(records.noises), records.collected.every)

    def facts(self, data: pd.DataFrame) -> dict[str, str]:
        """The machines whose cells are compared by the time of the device, in all sections."""
        names = sorted(data.loc[data[SOURCE] == DEVICE, "machine"].unique())
        return {"times compared": f"the device's, not wall-clock: {', '.join(names)}"} if names else {}

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """One table per setting and depth, folded if another table shows the same."""
        several = data["activations"].nunique() > 1
        tables: list[Table] = []
        corpus_of_data: dict[str, str] = {}
        for heading, keys, group in headed(data):
            baseline = group["baseline"].dropna().unique()
            renamed = len(baseline) and baseline[0] != BASELINE
            first = group.iloc[0]
            # The costs of a task hardly depend on its knobs.
            repeated = corpus_of_data.setdefault(first["data"], first["corpus"]) != first["corpus"]
            fold = repeated or (several and first["activations"] != KEEP)
            table = Table(
                cost(group),
                heading=heading,
                setting=keys,
                note=" ".join(
                    [
                        *([f"dense here is {baseline[0]}."] if renamed else []),
                        *_relative_to(group),
                        *_note(group),
                    ]
                ),
                folded=fold,
                caption=f"Cost of a training step: {keys}. Medians over replicates{_times(group)}",
            )
            tables.append(table)
        return tables

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """Cost against depth, linked only, and against length.

        With several activation strategies, cost against length is drawn only for settings of several lengths,
        and linked unless activations are kept. With several data sets, a single length and depth is not drawn
        for each: the figures hardly differ, and are in the tables.
        """
        several = data["activations"].nunique() > 1
        corpora = data["corpus"].nunique() > 1

        def keeps_activations(values: Mapping[str, Any], _: pd.DataFrame) -> bool:
            return not several or values["activations"] == KEEP

        def long(_: Mapping[str, Any], part: pd.DataFrame) -> bool:
            return not (corpora and one_point(part)) and not (several and part["seq_len"].nunique() < 2)

        def linked(values: Mapping[str, Any]) -> str:
            return "" if keeps_activations(values, data) else "The same with activations saved otherwise"

        by_depth = [
            FigureSpec(
                plot.stem,
                plot.title,
                data,
                plot.draw,
                SETTING,
                condition=keeps_activations,
                linked=lambda _: "Against depth",
            )
            for plot in BY_DEPTH
        ]
        by_length = [
            FigureSpec(plot.stem, plot.title, data, plot.draw, SETTING, condition=long, linked=linked)
            for plot in BY_LENGTH
        ]
        return [*by_depth, *by_length]


def _times(cells: pd.DataFrame) -> str:
    return "; times, ratios and throughput are of the device" if (cells[SOURCE] == DEVICE).any() else ""


def _relative_to(cells: pd.DataFrame) -> list[str]:
    """To how many measurements of dense the ratios of times are relative."""
    counts = cells.loc[cells["label"] != cells["baseline"], MEASURED].dropna()
    if counts.empty:
        return []
    single = int((counts < 2).sum())
    if single == len(counts):
        return ["Ratios of times are to the one measurement of dense in the same replicate."]
    if single:
        return [
            f"{single} of {len(counts)} ratios of times are to one measurement of dense, the others to two."
        ]
    return ["Ratios of times are to dense before and after."]


def _note(cells: pd.DataFrame) -> list[str]:
    """What is compared, where it is not wall-clock time."""
    if not _times(cells):
        return []
    return [
        "Ratios, intervals, throughput, growth, crossovers and fronts are of *device time*, in which the "
        "device is busy during a step; *wall time* is that of the whole step."
    ]


SECTIONS: Sequence[Section[Any]] = (Cost(),)
