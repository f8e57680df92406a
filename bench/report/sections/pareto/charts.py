"""Quality against cost as data for the page's charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.baselines import named_means
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import COMMON, TRAINING
from bench.report.figures.baselines import DASHES
from bench.report.figures.chart_data import Json, number, numbers, ticks
from bench.report.sections.pareto.data import FRONT, SCORES, pools
from bench.report.sections.pareto.plots import AXES
from bench.report.text import units
from bench.report.text.marks import CONTAMINATED
from bench.report.text.phrases import describe, training


def pareto_figures(cells: pd.DataFrame, settings: Mapping[tuple[Any, ...], int]) -> list[Json]:
    """Quality against cost, a figure for each pool of comparable models; see `Pareto`.

    `settings` numbers the values of `COMMON`; a pool's `setting` is its number.
    """
    if cells.empty:
        return []
    charts = []
    for values, own in pools(cells):
        training_keys = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
        accuracy = bool((own["score"] == "accuracy").all())
        bits = bool((own["score"] == "bits_per_byte").all())
        show = units.share if accuracy else units.score
        charts.append(
            {
                "pool": ", ".join([describe(values, ["seq_len", "depth"]), *training(values, training_keys)]),
                "setting": settings[tuple(values[key] for key in COMMON)],
                "axis": f"{SCORES[own['score'].iloc[0]]} ({'higher' if accuracy else 'lower'} is better)",
                "label": list(own["label"]),
                "activations": list(own["activations"]),
                "leaks": [bool(leak) for leak in own["leaks"]],
                "undertrained": [bool(value) for value in own["undertrained"].eq(True)],
                "baselines": [
                    {"name": name, "value": number(value), "text": units.score(value)}
                    for name, value in (named_means(own, DASHES) if bits else ())
                ],
                "quality": _figure(own, "quality", show),
                "costs": [
                    {
                        "name": AXES[cost][0],
                        **_figure(own, cost, AXES[cost][1], DISTURBED if cost == "time" else ""),
                        "front": [mark == FRONT for mark in own[f"{cost}_front"]],
                        "ticks": _cost_ticks(own, cost),
                    }
                    for cost in AXES
                    if own[cost].notna().any()
                ],
            }
        )
    return charts


def _cost_ticks(own: pd.DataFrame, cost: str) -> list[list[tuple[float, str]]]:
    values = own[[cost, f"{cost}_low", f"{cost}_high"]].to_numpy(dtype=float)
    ends = float(np.nanmin(values)), float(np.nanmax(values))
    return ticks(*ends, lambda value: AXES[cost][1](value, short=True), binary=cost == "memory")


def _figure(own: pd.DataFrame, name: str, show: Callable[[float], str], flag: str = "") -> Json:
    marks = own[flag] if flag else [False] * len(own)
    return {
        "value": numbers(own[name]),
        "low": numbers(own[f"{name}_low"]),
        "high": numbers(own[f"{name}_high"]),
        "disturbed": [bool(mark) for mark in marks],
        "text": [
            show(value) + (CONTAMINATED if is_marked and not pd.isna(value) else "")
            for value, is_marked in zip(own[name], marks, strict=True)
        ],
    }
