"""How much of a sweep each cell is, for the estimate of the time left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.config.spec import MeasureSpec
from bench.run.prepare import Job


def efforts(jobs: Sequence[Job]) -> dict[str, float]:
    """Return the effort of each cell by its id: 1, and for each rate that it tries the share of a training.

    Cells that share a search (replicates, twins) do it once: the first of them does, in the order of the
    sweep. What else makes cells differ, such as their lengths, is not looked at.
    """
    found: dict[str, float] = {}
    searched: set[str] = set()
    for job in jobs:
        spec, effort = job.cell.spec, 1.0
        if spec.measure.learning_rate == "search":
            shared = repr(replace(spec, replicate=0, twin=0))
            if shared not in searched:
                searched.add(shared)
                effort += len(spec.measure.search_rates) * _share_of_a_try(spec.measure)
        found[job.cell_id] = effort
    return found


def _share_of_a_try(measure: MeasureSpec) -> float:
    """The share of a whole training with which a search tries a rate: each budget is half of the next."""
    return 1.0 if measure.search_budget == "largest" else 0.5 ** (measure.train_budgets - 1)
