"""Costs at a single length as rows of dots, where lines over the length would be points above each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report.data.groups import split
from bench.report.figures import canvas
from bench.report.figures.dots import draw_dot, row_panels
from bench.report.figures.lines import GREY, Curve, Look, interval_of
from bench.report.figures.style import Style, variant_rank
from bench.report.sections.cost.lost import draw_cross, lost, lost_handles
from bench.report.text import units

if TYPE_CHECKING:
    from bench.report.sections.cost.plots import CostPlot

SHIFT = 0.3
"""Distance of the dots of two curves from each other, in rows."""
TICKS = 5
EDGE = 0.985
"""Place of the × of a cell that did not finish, as a share of the panel."""


def rows_of_dots(plot: CostPlot, cells: pd.DataFrame, look: Look) -> Figure:
    """A row a variant and a panel a depth; the dots of a dashed curve are hollow, as disturbed times are."""
    variant_of = dict(zip(cells["label"], cells["variant"], strict=True))
    rows = sorted(variant_of, key=lambda label: (variant_rank(variant_of[label]), label))
    places = {str(label): place for place, label in enumerate(rows)}
    parts = list(split(cells, ["depth"]))
    figure, axes = row_panels([f"depth {values['depth']}" for values, _ in parts], list(places))
    columns = [curve.column for curve in plot.curves]
    step = SHIFT if (cells[columns].notna().sum(axis=1) > 1).any() else 0.0
    low, high = plot.limits(cells)
    for axis, (_, part) in zip(axes, parts, strict=True):
        for number, curve in enumerate(plot.curves):
            _dots(axis, part, curve, step * (number - (len(columns) - 1) / 2), places, look.styles)
        for _, cell in lost(part).iterrows():
            edge = axis.get_yaxis_transform()
            draw_cross(axis, EDGE, places[str(cell["label"])], cell, look.styles, edge)
        axis.set_xscale("log", base=2)
        axis.set_xlim(low, high)
        canvas.human_axis(axis.xaxis, low, high, plot.tick, binary=plot.binary, most=TICKS)
        axis.set_xlabel(plot.axis)
    handles: list[Artist] = [_handle(curve) for curve in plot.named(cells)]
    footer = plot.footer(cells, look)
    if any(curve.spread for curve in plot.curves) and (cells["replicates"] > 1).any():
        footer += f" · bars: {interval_of(cells['replicates'])}"
    title = f"{plot.quantity}, length {units.length(cells['seq_len'].iloc[0])}"
    canvas.dress(figure, title, look.setting, footer, [*handles, *lost_handles(cells)])
    return figure


def _dots(
    axis: Axes,
    part: pd.DataFrame,
    curve: Curve,
    shift: float,
    places: dict[str, int],
    styles: dict[str, Style],
) -> None:
    for _, cell in part[part[curve.column] > 0].iterrows():
        label, value = str(cell["label"]), cell[curve.column]
        low, high = (cell[end] for end in curve.spread) if curve.spread else (value, value)
        hollow = curve.dashed or bool(curve.flag and cell[curve.flag])
        draw_dot(axis, places[label] + shift, value, low, high, styles[label], hollow=hollow)


def _handle(curve: Curve) -> Line2D:
    face = "none" if curve.dashed else GREY
    return Line2D([], [], color=GREY, marker="o", linestyle="", markerfacecolor=face, label=curve.name)
