"""Figures of a cell that are predicted on fake tensors: whether it fits, its FLOPs and its peak memory."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.config.spec import CellSpec
from bench.evaluate.receptive_field import connected_share, reach
from bench.measure import predict
from bench.records import Report
from bench.scenarios.figures import flop_figures, memory_figures

MAX_CONNECTED_TOKENS = 1024
"""Longest sequence for which a plan also computes `connected_share`; longer ones take more than a second."""


class DoesNotFit(Exception):
    """The predicted peak exceeds the memory that the cell may use; the message contains both."""


def is_audited(cell_id: str, share: float) -> bool:
    """Return whether a cell belongs to a pseudo-random sample that holds this share of all cells. The answer
    depends only on the arguments."""
    return int(cell_id, 16) < share * (1 << 4 * len(cell_id))


class Plan:
    """Predictions for one cell."""

    def __init__(self, spec: CellSpec, report: Report) -> None:
        self.spec, self.report = spec, report
        self.prediction = predict.Prediction(spec)

    def fit(self, budget: int) -> CellSpec:
        """Search for the largest batch and the longest sequence whose step fits into `budget` bytes less the
        share `measure.reserve` of them.

        Returns the cell's spec; with `batch_size=fit` its batch size is the largest one. Raises DoesNotFit if
        not even one sequence fits.
        """
        reserve = self.spec.measure.reserve
        self.report({"budget_bytes": budget, "reserve": reserve})
        usable = int(budget * (1 - reserve))
        batch_size = self.prediction.largest_batch_size(usable)
        self.report({"largest_batch_size": batch_size})
        if self.spec.batch_size:
            self.report({"longest_seq_len": self.prediction.longest_seq_len(usable)})
        elif batch_size:
            self.spec = replace(self.spec, batch_size=batch_size)
            self.report({"batch_size": batch_size})
        else:
            needed = self.prediction.predict(batch_size=1).peak_bytes
            raise DoesNotFit(
                f"one sequence is predicted to need {needed:,} bytes of {usable:,}: "
                f"the budget of {budget:,} less measure.reserve={reserve:g}"
            )
        return self.spec

    def check_memory(self, limit: int, *, cell_id: str, audit_share: float) -> None:
        """Raise DoesNotFit if the predicted peak of a step exceeds `limit` bytes.

        A sample of these cells, a share of `audit_share`, runs anyway: it shows how often the prediction is
        wrong.
        """
        peak = self.prediction.predict(batch_size=self.spec.batch_size).peak_bytes
        self.report({"peak_bytes_predicted": peak})
        if peak > limit:
            audited = is_audited(cell_id, audit_share)
            self.report({"audited": audited})
            if not audited:
                raise DoesNotFit(f"a step is predicted to need {peak:,} bytes, and may use {limit:,}")

    def run(self) -> None:
        """Report the predicted figures of a step. Raises gates.GateFailed as `flop_figures` does."""
        figures = self.prediction.predict(batch_size=self.spec.batch_size)
        with torch.device("meta"):
            model = predict.build_model(self.spec)
        self.report(flop_figures(self.spec, model, figures, source="predicted"))
        self.report(memory_figures(figures, source="predicted"))
        self.report({"peak_bytes_predicted": figures.peak_bytes})
        if self.spec.measure.reach:
            self.report({"reach": reach(model, self.spec.seq_len, causal=self.spec.causal)})
        if (seq_len := self.spec.seq_len) <= MAX_CONNECTED_TOKENS:
            self.report({"connected_share": connected_share(model, seq_len, causal=self.spec.causal)})
