"""Cost against length as data for the page's charts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from bench.report.figures.chart_data import Json, numbers, ticks
from bench.report.figures.lines import Curve
from bench.report.sections.cost.plots import BY_LENGTH, CostPlot, with_predictions
from bench.report.text.marks import disturbed


def cost_figures(cells: pd.DataFrame) -> list[Json]:
    """The cost of each cell against its length, a figure for each of `BY_LENGTH` that has data.

    A curve's values, its intervals and its words are lists with one entry a cell, in the cells' order.
    """
    if cells.empty:
        return []
    cells = with_predictions(cells)
    charts = []
    for plot in BY_LENGTH:
        columns = [c for curve in plot.curves for c in (curve.column, *(curve.spread or ()))]
        values = cells[columns].where(cells[columns] > 0).to_numpy(dtype=float)
        if np.isfinite(values).any():
            ends = float(np.nanmin(values)), float(np.nanmax(values))
            charts.append(
                {
                    **_head(plot),
                    "curves": _curves(plot, cells),
                    "ticks": ticks(*ends, partial(plot.unit, short=True), binary=plot.binary),
                }
            )
    return charts


def _head(plot: CostPlot) -> Json:
    return {
        "stem": plot.stem,
        "title": plot.title.removesuffix(" against sequence length"),
        "axis": plot.axis,
    }


def _texts(plot: CostPlot, cells: pd.DataFrame, curve: Curve) -> list[str]:
    if not curve.flag:
        return [plot.unit(value) for value in cells[curve.column]]
    return [disturbed(row, curve.column, plot.unit, curve.flag) for _, row in cells.iterrows()]


def _curves(plot: CostPlot, cells: pd.DataFrame) -> list[Json]:
    return [
        {
            "name": curve.name,
            "dashed": curve.dashed,
            "hollow": curve.hollow,
            "timed": bool(curve.flag),
            "value": numbers(cells[curve.column].where(cells[curve.column] > 0)),
            "text": _texts(plot, cells, curve),
            **(
                {end: numbers(cells[name]) for end, name in zip(("low", "high"), curve.spread, strict=True)}
                if curve.spread
                else {}
            ),
        }
        for curve in plot.curves
        if (cells[curve.column] > 0).any()
    ]
