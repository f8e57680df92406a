"""The training curves of finished cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import TASK
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.training.data import training_curves
from bench.report.sections.training.plots import training_loss


@dataclass(frozen=True)
class Curves:
    """The cells that have a curve, and the files that are not one."""

    cells: pd.DataFrame
    unread: list[str]


class Training(Section[Curves]):
    """Only figures, because the curves are already files next to the records."""

    name = "training"
    order = 130
    title = "Training"
    lead = "The loss on the batches that were trained on, each before its update; curves/ has every cell's."

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Curves:
        """Read from the experiment's folder."""
        return Curves(*training_curves(records.kinds.plain, records.folder))

    def figures(self, data: Curves) -> list[FigureSpec]:
        """Loss against tokens."""
        return [FigureSpec("training_loss", "Training loss", data.cells, training_loss, TASK)]

    def problems(self, data: Curves) -> list[str]:
        """The files that are not a training curve."""
        return data.unread


SECTIONS: Sequence[Section[Any]] = (Training(),)
