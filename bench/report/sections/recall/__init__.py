"""Tasks with answers: the share of correct answers, compared with guessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import TASK
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.recall import plots
from bench.report.sections.recall.data import axes_of, recall_cells
from bench.report.sections.recall.state import ENOUGH, OF_HEADS, by_state, needed_table, state_needed
from bench.report.sections.recall.tables import accuracies
from bench.report.text.marks import LEAK, meanings
from bench.report.text.phrases import headed
from bench.report.text.tables import Table

NEEDED = (
    "For each variant whose state was measured in several sizes: the least *state needed* for "
    f"{100 * ENOUGH:.0f} % of the accuracy of dense attention, which keeps every key and value, and the most "
    "accurate of its cells. A dash: none of the sizes was enough after this training."
)


class Recall(Section[pd.DataFrame]):
    """Its data are `recall_cells` at every learning rate; shown is each variant's best."""

    name = "recall"
    order = 110
    title = "Recall"
    needs = ("rates",)
    lead = (
        "The share of answers that are right: the mean ± standard deviation over replicates. *guessing* is "
        "what comes of guessing among the values in the context, or of always naming the most frequent "
        "class: what does not beat it has learnt nothing of the task. *state*: the bytes that all layers "
        "carry to the next token of one sequence. *reaches*: how many tokens before the last the farthest "
        "lies that its output can depend on, by the variant's pattern; a dash where the content decides. "
        "Where several learning rates were tried, all figures are at a variant's best, by the least mean "
        "loss."
    )
    marks = meanings(LEAK)
    csv = ("recall",)

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> pd.DataFrame:
        """One row a cell, training and state policy with an accuracy."""
        return recall_cells(records.kinds.plain, done["rates"])

    def tables(self, data: pd.DataFrame) -> list[Table]:
        """A table a task and model size, and one of the state that is needed where its size was swept."""
        if data.empty:
            return []
        keys = ("objective", "data", "d_model", "heads")
        tables = []
        for _, heading, group in headed(_best(data), keys):
            tables.append(Table(accuracies(group), heading))
        for _, heading, group in headed(_best(data), tuple(key for key in keys if key not in OF_HEADS)):
            if len(needed := state_needed(group)):
                tables.append(Table(needed_table(needed), f"{heading}: state", NEEDED))
        return tables

    def figures(self, data: pd.DataFrame) -> list[FigureSpec]:
        """Accuracy against each knob of a task, against the state, and by distance."""
        best = _best(data)
        tasks = {} if best.empty else {task: axes_of(own) for task, own in best.groupby("data")}
        specs = []
        for name in sorted({name for axes in tasks.values() for name in axes}):
            of = best[[name in tasks[task] for task in best["data"]]]
            title = f"Accuracy against {name}"
            specs.append(FigureSpec(f"accuracy_by_{name}", title, of, plots.against(name), TASK))
        state = "Accuracy against the state that is carried"
        of_any_heads = tuple(key for key in TASK if key not in OF_HEADS)
        specs.append(FigureSpec("accuracy_by_state", state, best, by_state, of_any_heads))
        for stem, title, draw in (
            ("accuracy_by_distance", "Accuracy by distance", plots.by_distance),
            ("accuracy_map", "Accuracy by distance, as a map", plots.distance_map),
        ):
            specs.append(FigureSpec(stem, title, best, draw, TASK))
        return specs

    def csv_tables(self, data: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """The cells at every rate, without the columns that are lists."""
        lists = ["data_params", "distance_edges", "accuracy_by_distance"]
        return {"recall": data.drop(columns=lists)} if len(data) else {}


def _best(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells at each variant's best learning rate."""
    return cells if cells.empty else cells[cells["best"]]


SECTIONS: Sequence[Section[Any]] = (Recall(),)
