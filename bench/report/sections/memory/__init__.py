"""Memory by activation strategy: the parts of the peak, the cost of recomputation, prediction errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import COMMON
from bench.report.figures.spec import FigureSpec, one_point
from bench.report.sections import Section
from bench.report.sections.memory import data as cells_of
from bench.report.sections.memory import plots, tables
from bench.report.text.marks import CONTAMINATED, PREDICTED, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table


@dataclass(frozen=True)
class Peaks:
    """The frames of `data` by the names of their functions, and the cost cells."""

    parts: pd.DataFrame
    recomputation: pd.DataFrame
    predictions: pd.DataFrame
    cost: pd.DataFrame


class Memory(Section[Peaks]):
    """Peaks, measured and predicted."""

    name = "memory"
    order = 70
    title = "Memory"
    needs = ("cost",)
    lead = (
        "The peak is the most that is live at any time of a step; *saved activations* is what the forward "
        "pass leaves for the backward pass."
    )
    marks = meanings(CONTAMINATED, PREDICTED)
    csv = ("recomputation",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Peaks:
        """Parts and recomputation of ordinary cells; predictions of every cell that was measured."""
        plain = records.kinds.plain
        return Peaks(
            cells_of.peak_parts(plain),
            cells_of.recomputation(plain),
            cells_of.prediction_errors(records.collected.frame),
            done["cost"],
        )

    def tables(self, data: Peaks) -> list[Table]:
        """The cost of recomputation, then the error of predictions."""
        return [*_recomputation(data.recomputation), *_predictions(data.predictions)]

    def figures(self, data: Peaks) -> list[FigureSpec]:
        """The parts of the peak, and growth with depth; with several data sets, not for a single length and
        depth of each."""
        corpora = data.cost["corpus"].nunique() > 1

        def is_shown(_: Mapping[str, Any], part: pd.DataFrame) -> bool:
            return not (corpora and one_point(part))

        kinds = (
            ("peak_parts", "What the peak is made of", data.parts, plots.waterfall),
            (
                "activations_by_depth",
                "Saved activations against depth",
                data.cost,
                plots.activations_by_depth,
            ),
            ("peak_by_depth", "Peak memory against depth", data.cost, plots.peak_by_depth),
        )
        return [
            FigureSpec(
                stem, title, cells, draw, COMMON, condition=is_shown, all_variants=draw is plots.waterfall
            )
            for stem, title, cells, draw in kinds
        ]

    def csv_tables(self, data: Peaks) -> dict[str, pd.DataFrame]:
        """The cost of recomputation, if there are several strategies."""
        return {"recomputation": data.recomputation} if len(data.recomputation) else {}


def _recomputation(cells: pd.DataFrame) -> list[Table]:
    if cells.empty:
        return []
    lead = (
        "What each way of saving activations costs beside `keep`, at the longest length and the greatest "
        "depth that the ways share; recomputation.csv has every cell. A ratio is the median over replicates, "
        "each against `keep` in the same replicate. *rebuild error*: the largest error of a block's input "
        "as a reversible network's backward pass rebuilt it, relative to the input's largest entry, worst of "
        "all blocks. *gradient error*: the largest difference of a gradient from what stored activations "
        "give, relative to the largest entry of any."
    )
    result = []
    for place, (_, keys, group) in enumerate(headed(cells, COMMON)):
        at = cells_of.shared(group)
        where = f"{keys}, length {at['seq_len'].iloc[0]}, depth {at['depth'].iloc[0]}"
        result.append(
            Table(tables.recomputation(at), setting=where)
            if place
            else Table(tables.recomputation(at), "Cost of recomputation", lead, where)
        )
    return result


def _predictions(errors: pd.DataFrame) -> list[Table]:
    if errors.empty:
        return []
    lead = (
        "Peaks predicted without running, against the measured ones: the error is predicted over measured, "
        "less 1. Median and 95th percentile are without its sign. A cell is one replicate."
    )
    far = tables.far_off(errors)
    none = "" if far else f"No cell is off by more than {cells_of.FAR:.0%}."
    result = [Table(tables.predictions(errors), "Prediction against measurement", lead, note=none)]
    return [*result, Table(far, lead=f"Further off than {cells_of.FAR:.0%}:")] if far else result


SECTIONS: Sequence[Section[Any]] = (Memory(),)
