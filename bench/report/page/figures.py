"""The page's charts as data: the plots' own curves and axes, with ticks in human units at every zoom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.report import units
from bench.report.cost_plots import BY_LENGTH, CostPlot, with_predictions
from bench.report.groups import COMMON, TRAINING, describe, training
from bench.report.pareto import FRONT, pools
from bench.report.pareto_plots import AXES

Json = dict[str, Any]

_BINARY = ((2.0, (1.0, 1.25, 1.5, 1.75)), (2.0, (1.0,)), (4.0, (1.0,)), (16.0, (1.0,)), (64.0, (1.0,)))
_DECIMAL = (
    (10.0, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)),
    (10.0, (1.0, 2.0, 5.0)),
    (10.0, (1.0, 3.0)),
    (10.0, (1.0,)),
)
"""From the finest ticks to the coarsest: a base, and the multiples of its powers."""


def number(value: Any) -> float | int | None:
    """A figure for JSON: six significant digits, None where it was not taken."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded


def numbers(values: pd.Series[Any]) -> list[float | int | None]:
    """A column of figures for JSON."""
    return [number(value) for value in values.to_numpy(dtype=float, na_value=np.nan)]


def cost_figures(cells: pd.DataFrame) -> list[Json]:
    """The cost of each cell against its length, a figure for each of `cost_plots.BY_LENGTH` that has data.

    A curve's values, its intervals and its words are lists with one entry a cell, in the cells' order.
    """
    if cells.empty:
        return []
    cells = with_predictions(cells)
    found = []
    for plot in BY_LENGTH:
        columns = [c for curve in plot.curves for c in (curve.column, *(curve.spread or ()))]
        values = cells[columns].where(cells[columns] > 0).to_numpy(dtype=float)
        if np.isfinite(values).any():
            ends = float(np.nanmin(values)), float(np.nanmax(values))
            found.append({**_head(plot), "curves": _curves(plot, cells), "ticks": ticks(*ends, plot)})
    return found


def _head(plot: CostPlot) -> Json:
    return {
        "stem": plot.stem,
        "title": plot.title.removesuffix(" against sequence length"),
        "axis": plot.axis,
        "more_is_better": plot.more_is_better,
    }


def _curves(plot: CostPlot, cells: pd.DataFrame) -> list[Json]:
    return [
        {
            "name": curve.name,
            "dashed": curve.dashed,
            "hollow": curve.hollow,
            "value": numbers(cells[curve.column].where(cells[curve.column] > 0)),
            "text": [plot.unit(value) for value in cells[curve.column]],
            **(
                {end: numbers(cells[name]) for end, name in zip(("low", "high"), curve.spread, strict=True)}
                if curve.spread
                else {}
            ),
        }
        for curve in plot.curves
        if (cells[curve.column] > 0).any()
    ]


def ticks(low: float, high: float, plot: CostPlot) -> list[list[tuple[float, str]]]:
    """Places and labels of ticks on a logarithmic axis, in several levels from the finest to the coarsest.

    Which level a chart shows follows from what is chosen to be in it.
    """
    return _ticks(low, high, lambda value: plot.unit(value, short=True), binary=plot.binary)


def _ticks(
    low: float, high: float, show: Callable[[float], str], *, binary: bool
) -> list[list[tuple[float, str]]]:
    found = []
    for base, multiples in _BINARY if binary else _DECIMAL:
        powers = range(math.floor(math.log(low, base)) - 1, math.ceil(math.log(high, base)) + 2)
        places = [multiple * base**power for power in powers for multiple in multiples]
        found.append([(number(v) or 0.0, show(v)) for v in places if low / 4 <= v <= high * 4])
    return found


def lengths(values: Sequence[int]) -> list[tuple[int, str]]:
    """The lengths, each with its short name: (4096, '4k')."""
    return [(int(value), units.length(value)) for value in sorted(set(values))]


def pareto_figures(cells: pd.DataFrame, settings: Mapping[tuple[Any, ...], int]) -> list[Json]:
    """What quality costs, a figure for each pool of models that stand against each other; see `pareto`.

    `settings` numbers the values of `COMMON`; a pool's `setting` is its number.
    """
    if cells.empty:
        return []
    found = []
    for values, own in pools(cells):
        asked = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
        accuracy = bool((own["score"] == "accuracy").all())
        show = units.share if accuracy else units.score
        found.append(
            {
                "pool": f"{describe(values, ['seq_len', 'depth'])}, {', '.join(training(values, asked))}",
                "setting": settings[tuple(values[key] for key in COMMON)],
                "axis": "accuracy (higher is better)" if accuracy else "nats a token (lower is better)",
                "label": list(own["label"]),
                "activations": list(own["activations"]),
                "leaks": [bool(leak) for leak in own["leaks"]],
                "quality": _figure(own, "quality", show),
                "costs": [
                    {
                        "name": AXES[cost][0],
                        **_figure(own, cost, AXES[cost][1]),
                        "front": [mark == FRONT for mark in own[f"{cost}_front"]],
                        "ticks": _cost_ticks(own, cost),
                    }
                    for cost in AXES
                    if own[cost].notna().any()
                ],
            }
        )
    return found


def _cost_ticks(own: pd.DataFrame, cost: str) -> list[list[tuple[float, str]]]:
    values = own[[cost, f"{cost}_low", f"{cost}_high"]].to_numpy(dtype=float)
    ends = float(np.nanmin(values)), float(np.nanmax(values))
    return _ticks(*ends, lambda value: AXES[cost][1](value, short=True), binary=cost == "memory")


def _figure(own: pd.DataFrame, name: str, show: Callable[[float], str]) -> Json:
    return {
        "value": numbers(own[name]),
        "low": numbers(own[f"{name}_low"]),
        "high": numbers(own[f"{name}_high"]),
        "text": [show(value) for value in own[name]],
    }
