"""Pareto fronts: models that no other dominates in quality and a cost, trained on equally many tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import COMMON, TRAINING, varying
from bench.report.figures.chart_data import Json
from bench.report.figures.spec import FigureSpec, one_point
from bench.report.sections import Section
from bench.report.sections.pareto.charts import pareto_figures
from bench.report.sections.pareto.data import POOL, on_a_front, pareto_cells, pools
from bench.report.sections.pareto.plots import pareto
from bench.report.sections.pareto.tables import MAYBE, models
from bench.report.text.marks import CONTAMINATED, LEAK, NO_BASELINE, UNDERTRAINED
from bench.report.text.phrases import describe, training
from bench.report.text.tables import Table, first_open


@dataclass(frozen=True)
class Fronts:
    """The `pareto_cells`; `places` numbers the page's settings, and `corpora` says whether there are several
    data sets."""

    models: pd.DataFrame
    places: Mapping[tuple[Any, ...], int]
    corpora: bool


class Pareto(Section[Fronts]):
    """Quality against time, memory and FLOPs."""

    name = "pareto"
    order = 60
    title = "Pareto fronts"
    needs = ("cells",)
    lead = (
        "Models trained on equally many tokens, best first: mean quality and median cost over replicates "
        "with their 95 % intervals, of two replicates their range. A model is on the front of a cost where "
        "no other is as good and as cheap, and better in one."
    )
    marks = MappingProxyType(
        {
            MAYBE: "another is better in both, but not beyond the intervals and the noise floor",
            CONTAMINATED: "timed while something else ran, with no undisturbed measurement: on no front of "
            "time",
            LEAK: "sees the future: on no front",
            UNDERTRAINED: "undertrained: worse than a 3-gram table that learnt the same bytes; on no front",
            NO_BASELINE: "no baseline: the bytes of its token ids are not known; on no front",
        }
    )
    csv = ("pareto",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Fronts:
        """The fronts of each pool of comparable models."""
        cells = done["cells"]
        corpora = cells.summary["corpus"].nunique() > 1
        return Fronts(pareto_cells(cells.summary), cells.places, corpora)

    def tables(self, data: Fronts) -> list[Table]:
        """A table a pool, best first."""
        if data.models.empty:
            return []
        keys = [key for key in POOL if key not in (*TRAINING, "tokens_trained")]
        apart = varying(data.models, POOL)
        named = [key for key in COMMON if key in ("objective", "corpus", *apart)]
        tables = []
        for values, own in pools(data.models):
            training_keys = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
            trained = training(values, [key for key in training_keys if key in apart])
            heading = ", ".join([describe(values, [*named, "seq_len", "depth"]), *trained])
            setting = ", ".join([describe(values, keys), *training(values, training_keys)])
            tables.append(Table(models(own), heading, setting=setting))
        return first_open(tables)

    def figures(self, data: Fronts) -> list[FigureSpec]:
        """Quality against each cost; with several data sets, not for a single length and depth of each."""

        def is_shown(_: Mapping[str, Any], part: pd.DataFrame) -> bool:
            return not (data.corpora and one_point(part))

        keys = (*COMMON, "depth")
        title = "Quality against cost"
        return [
            FigureSpec(
                "pareto",
                title,
                data.models,
                pareto,
                keys,
                condition=is_shown,
                front=True,
                always=on_a_front,
            )
        ]

    def csv_tables(self, data: Fronts) -> dict[str, pd.DataFrame]:
        """The models, if there are any."""
        return {"pareto": data.models} if len(data.models) else {}

    def page_charts(self, data: Fronts) -> dict[str, list[Json]]:
        """The same figures as charts."""
        return {"pareto": pareto_figures(data.models, data.places)}


SECTIONS: Sequence[Section[Any]] = (Pareto(),)
