"""Every plot of a report: which there are, one figure a setting, and where they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bench.report import canvas, cost_plots, quality_plots
from bench.report.groups import SETTING, describe, split, suffix, varying
from bench.report.style import styles
from bench.report.summary import dates, machines

Draw = Callable[[pd.DataFrame, cost_plots.Look], Figure | None]


def draw_all(
    frame: pd.DataFrame, cost: pd.DataFrame, quality: pd.DataFrame, report: Path
) -> dict[str, list[tuple[str, str]]]:
    """Write every plot that has data into `report`/plots, as PNG and SVG.

    Returns, for the sections 'cost' and 'quality', each plot's title and its path relative to
    the report, without suffix.
    """
    jobs: list[tuple[str, str, str, pd.DataFrame, Draw]] = [
        ("cost", plot.stem, plot.title, cost, plot.draw) for plot in cost_plots.PLOTS
    ]
    jobs.append(("quality", "perplexity", "Perplexity", quality, quality_plots.perplexity))
    jobs.append(("quality", "nll_by_position", "Loss by position", frame, quality_plots.by_position))
    look = styles(zip(frame["variant"], frame["label"], strict=True))
    found: dict[str, list[tuple[str, str]]] = {"cost": [], "quality": []}
    taken: set[str] = set()
    with canvas.look():
        for section, stem, title, data, draw in jobs:
            apart = varying(frame, SETTING)
            for values, part in split(data, SETTING):
                footer = f"{machines(_same(frame, values))} · {dates(_same(frame, values))}"
                setting = describe(values, [k for k in SETTING if k not in ("machine", "threads")])
                figure = draw(part, cost_plots.Look(look, setting, footer))
                if figure is None:
                    continue
                name = _free(stem + suffix(values, apart), taken)
                canvas.save(figure, report / "plots", name)
                words = describe(values, apart)
                found[section].append((f"{title} ({words})" if words else title, f"plots/{name}"))
    return found


def _same(frame: pd.DataFrame, values: dict[str, object]) -> pd.DataFrame:
    """The records of one setting."""
    return frame[(frame[list(values)] == pd.Series(values)).all(axis=1)]


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where two settings differ only in characters a file name cannot hold."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free
