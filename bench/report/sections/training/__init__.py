"""The training curves of finished cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report.data.experiment import Experiment
from bench.report.data.groups import TASK
from bench.report.data.kinds import with_lists
from bench.report.figures.spec import FigureSpec
from bench.report.sections import Section
from bench.report.sections.training.data import training_curves
from bench.report.sections.training.plots import training_loss, validation_loss


@dataclass(frozen=True)
class Curves:
    """The cells that have a curve, those that were validated in training, and the files that are no curve."""

    cells: pd.DataFrame
    validated: pd.DataFrame
    unread: list[str]


class Training(Section[Curves]):
    """Only figures, because the curves are already files next to the records."""

    name = "training"
    order = 130
    title = "Training"
    lead = (
        "The loss on the batches that were trained on, each before its update; curves/ has every cell's. "
        "With measure.validations, also the loss on the validation split, which is never trained on: where "
        "it rises while the training loss falls, the model overfits."
    )

    def compute(self, records: Experiment, done: Mapping[str, Any]) -> Curves:
        """Training curves are read from the experiment's folder, validation curves from the records."""
        frame = records.kinds.plain
        cells, unread = training_curves(frame, records.folder)
        validated = with_lists(frame, "validation_tokens", "validation_nll")
        return Curves(cells, validated, unread)

    def figures(self, data: Curves) -> list[FigureSpec]:
        """Both losses against tokens."""
        return [
            FigureSpec("training_loss", "Training loss", data.cells, training_loss, TASK),
            FigureSpec("validation_loss", "Validation loss", data.validated, validation_loss, TASK),
        ]

    def problems(self, data: Curves) -> list[str]:
        """The files that are not a training curve."""
        return data.unread


SECTIONS: Sequence[Section[Any]] = (Training(),)
