"""Ranks of modifications on one task against those on another, a panel a pair of tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from bench.report.figures import canvas
from bench.report.figures.lines import GREY, Look, replicates
from bench.report.sections.modifications.data import scores_of
from bench.report.sections.modifications.names import DEFAULT, PARTS
from bench.report.sections.modifications.tables import interval_text, signed
from bench.report.sections.modifications.transfer import transfers

TITLE = "Does what helps on one task help on another?"
MOST_PANELS = 12
COLOURS = dict(zip(PARTS, ("#0072B2", "#B34700", "#00734D", "#8B3A83"), strict=True))
"""The part of a model that is changed → its colour."""
SIZE = 13
"""Diameter of a point, in points."""


def draw(cells: pd.DataFrame, look: Look) -> Figure | None:
    """The pairs of tasks with the most modifications; None without any. Takes `modification_cells`."""
    found = transfers(cells)
    pairs = found[~found["seeds"]] if len(found) else found
    if pairs.empty:
        return None
    left_out = max(0, len(pairs) - MOST_PANELS)
    pairs = pairs.sort_values("modifications", ascending=False, kind="stable").head(MOST_PANELS).sort_index()
    numbers, part_of = _numbers(cells)
    figure, axes = canvas.panels(len(pairs), width=3.1, height=3.2, sharey=False)
    for axis, (_, pair) in zip(axes, pairs.iterrows(), strict=True):
        _pair(axis, pair, cells, numbers, part_of)
    words = "filled: certainly different from the default on both tasks · dashed: the default's place"
    more = f" · {left_out} more pairs are in the table" if left_out else ""
    footer = f"{look.footer} · {replicates(cells['replicates'])} · {words}{more}"
    canvas.dress(figure, TITLE, look.setting, footer, _legend(numbers, part_of))
    return figure


def _numbers(cells: pd.DataFrame) -> tuple[dict[str, int], dict[str, str]]:
    """The number of each modification, by the part that it changes and by its mean rank; and that part."""
    own = cells[cells["modification"] != DEFAULT]
    part_of = dict(zip(own["modification"], own["part"], strict=True))
    ranks = own.groupby("modification")["rank"].mean().fillna(np.inf)
    order = sorted(part_of, key=lambda name: (PARTS.index(part_of[name]), ranks[name], name))
    return {name: place for place, name in enumerate(order, 1)}, part_of


def _pair(
    axis: Axes, pair: pd.Series[Any], cells: pd.DataFrame, numbers: dict[str, int], part_of: dict[str, str]
) -> None:
    scores = scores_of(cells)[[pair["first_pool"], pair["second_pool"]]].dropna()
    ranks = scores.rank(ascending=False)
    count = len(ranks)
    axis.plot([1, count], [1, count], color="#dddddd", linewidth=1, zorder=0)
    for which, (pool, line) in enumerate(
        zip((pair["first_pool"], pair["second_pool"]), (axis.axvline, axis.axhline), strict=True)
    ):
        place = _place_of_default(cells, pool, scores.iloc[:, which])
        if place is not None:
            line(place, color=GREY, linestyle="--", linewidth=0.9, zorder=1)
    own = cells[cells["pool"].isin([pair["first_pool"], pair["second_pool"]])]
    certain = own.groupby("modification")["differs"].agg(lambda flags: bool(flags.eq(True).all()))
    for name, (x, y) in zip(ranks.index, ranks.to_numpy(), strict=True):
        colour, filled = COLOURS[part_of[name]], certain[name]
        face = colour if filled else "white"
        axis.plot([x], [y], marker="o", markersize=SIZE, markerfacecolor=face, markeredgecolor=colour)
        ink = "white" if filled else colour
        axis.text(x, y, str(numbers[name]), ha="center", va="center_baseline", fontsize=7, color=ink)
    for set_label, task in ((axis.set_xlabel, pair["first"]), (axis.set_ylabel, pair["second"])):
        set_label(f"rank on {task}", fontsize=8)
    interval = interval_text(pair)
    ends = f" ({interval})" if not pd.isna(pair["rho_low"]) else ""
    axis.set_title(f"ρ = {signed(pair['rho'])}{ends}", fontsize=8.5)
    _ranks(axis, count)


def _place_of_default(cells: pd.DataFrame, pool: int, scores: pd.Series[float]) -> float | None:
    """Where the default is among the ranks of the modifications, between two of them; None without it."""
    own = cells[(cells["pool"] == pool) & (cells["modification"] == DEFAULT)]
    if own.empty or pd.isna(own["score"].iloc[0]):
        return None
    score = own["score"].iloc[0]
    return float((scores > score).sum() + (scores == score).sum() / 2 + 0.5)


def _ranks(axis: Axes, count: int) -> None:
    """Both axes from the worst to the best, which is at the right and at the top."""
    step = 5 if count > 10 else 2 if count > 5 else 1
    ticks = [1, *range(step, count + 1, step)] if step > 1 else [*range(1, count + 1)]
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(FixedLocator(ticks))
    axis.set_xlim(count + 0.9, 0.1)
    axis.set_ylim(count + 0.9, 0.1)
    axis.set_aspect("equal")
    axis.tick_params(labelsize=7)


def _legend(numbers: dict[str, int], part_of: dict[str, str]) -> list[Artist]:
    """A line a modification, under the name of the part that it changes."""
    handles: list[Artist] = []
    for part in PARTS:
        names = [name for name in numbers if part_of[name] == part]
        if names:
            handles.append(Line2D([], [], linestyle="", label=part))
        handles += [
            Line2D([], [], linestyle="", marker="o", color=COLOURS[part], label=f"{numbers[name]}  {name}")
            for name in names
        ]
    return handles
