"""Rows of dots: a row a name, whose dots have bars for their intervals, for values of one length."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.figures import canvas
from bench.report.figures.style import Style

WIDTH = 2.9
"""Inches of a panel without the names of its rows."""


def row_panels(headings: Sequence[str], rows: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A panel under each heading; the rows have their names on the left, the first on top."""
    height = 0.6 + 0.2 * len(rows)
    figure, axes = canvas.panels(len(headings), width=WIDTH, height=height, columns=canvas.SMALL_COLUMNS)
    for axis, heading in zip(axes, headings, strict=True):
        axis.set_title(heading)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.set_figwidth(figure.get_figwidth() + canvas.LETTER * max(map(len, rows)))
    return figure, axes


def draw_dot(
    axis: Axes, place: float, value: float, low: float, high: float, style: Style, *, hollow: bool
) -> None:
    """A dot in the row at `place`, with a bar from `low` to `high`; NaN and an end on the wrong side of the
    value leave no whisker."""
    below, above = (max(0.0, end) if end == end else 0.0 for end in (value - low, high - value))
    axis.errorbar(
        [value],
        [place],
        xerr=[[below], [above]] if below or above else None,
        color=style.colour,
        marker=style.marker,
        fillstyle="none" if hollow else style.fill,
        markerfacecoloralt="white",
        capsize=2.5,
        linestyle="",
    )
