"""The × of cells that did not finish, pale where some replicates did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import Transform

from bench.report.figures import canvas
from bench.report.figures.lines import GREY
from bench.report.figures.style import Style

PARTLY = 0.4
"""How strong the × of a cell is that finished in some replicates."""


def lost(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that did not finish in all replicates."""
    return cells[cells["finished"] < cells["records"]]


def lost_handles(cells: pd.DataFrame) -> list[Artist]:
    """Handles of the legend for the × of these cells."""
    handles: list[Artist] = []
    if (cells["finished"] == 0).any():
        handles.append(_cross("did not finish"))
    if (lost(cells)["finished"] > 0).any():
        handles.append(_cross("finished in part", PARTLY))
    return handles


def _cross(label: str, alpha: float = 1.0) -> Line2D:
    return Line2D([], [], color=GREY, marker="x", markeredgewidth=1.8, linestyle="", alpha=alpha, label=label)


def mark_lost(axis: Axes, part: pd.DataFrame, styles: dict[str, Style], top: float, along: str) -> None:
    """A × in the strip above the data for each cell that did not finish, one below the other."""
    if axis.get_ylim()[1] <= top * 1.001:
        return
    axis.axhline(top, color="#bbbbbb", linewidth=0.8, linestyle=":")
    for x, y, cell in _places(lost(part), along):
        draw_cross(axis, x, y, cell, styles, axis.get_xaxis_transform())


def _places(found: pd.DataFrame, along: str) -> Iterator[tuple[float, float, pd.Series[Any]]]:
    """Place, height (share of the panel) and cell of each ×."""
    for place, same in found.groupby(along):
        for number, (_, cell) in enumerate(same.sort_values("label").iterrows()):
            yield float(str(place)), 0.975 - canvas.MARK_ROW * (number % canvas.MOST_MARK_ROWS), cell


def draw_cross(
    axis: Axes, x: float, y: float, cell: pd.Series[Any], styles: dict[str, Style], at: Transform
) -> None:
    """The × of a cell at a place in the coordinates of a transform."""
    axis.plot(
        [x],
        [y],
        marker="x",
        markersize=5.5,
        markeredgewidth=1.8,
        alpha=PARTLY if cell["finished"] else 1.0,
        color=styles[str(cell["label"])].colour,
        transform=at,
        clip_on=False,
    )
