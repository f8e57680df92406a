"""Quality against cost as a table: a row a trained model, with the fronts that it is on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import varying
from bench.report.sections.pareto.data import COSTS, FRONT, NOISE, SCORES
from bench.report.text import units
from bench.report.text.cells import label_of
from bench.report.text.columns import Column, each
from bench.report.text.marks import CONTAMINATED

MAYBE = "≈"
NAMES = {"time": "time", "memory": "memory", "flops": "FLOPs"}


def models(cells: pd.DataFrame) -> list[Column]:
    """The models of one pool, best first; takes rows of `pareto.pareto_cells`."""
    accuracy = bool((cells["score"] == "accuracy").all())
    cells = cells.sort_values("quality", ascending=not accuracy, kind="stable")
    rows = [row for _, row in cells.iterrows()]
    quality = units.share if accuracy else units.score
    saved = [each(cells, "activations", "activations", str, right=False)]
    return [
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
        *(saved if varying(cells, ["activations"]) else []),
        Column(SCORES[str(cells["score"].iloc[0])], [_spread(row, "quality", quality) for row in rows]),
        Column("step time", [_time(row) for row in rows]),
        Column("peak memory", [_spread(row, "memory", units.size) for row in rows]),
        each(cells, "executed FLOPs", "flops", units.flops),
        Column("on the front of", [_fronts(row) for row in rows], right=False, optional=False),
        each(cells, "replicates", "replicates", units.whole, optional=False),
    ]


def _spread(row: pd.Series[Any], name: str, show: Callable[[float], str]) -> str:
    """The figure and its interval: '4.02 (3.98 – 4.07)'."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if units.missing(low) or show(low) == show(high):
        return show(row[name])
    return f"{show(row[name])} ({show(low)} – {show(high)})"


def _time(row: pd.Series[Any]) -> str:
    mark = CONTAMINATED if row[DISTURBED] and not units.missing(row["time"]) else ""
    return _spread(row, "time", units.seconds) + mark


def _fronts(row: pd.Series[Any]) -> str:
    """The costs by which no other model dominates it, those within the intervals marked."""
    marks = {FRONT: "", NOISE: MAYBE}
    fronts = [NAMES[name] + marks[row[f"{name}_front"]] for name in COSTS if row[f"{name}_front"] in marks]
    return ", ".join(fronts) or units.MISSING
