"""Common parts of the figures of cost, quality and recall: lines and bands in a variant's style, words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.report.figures.style import Style, variant_rank

GREY = "#555555"
DISTURBED_NOTE = " · hollow: timed while something else ran (§ in the tables)"


@dataclass(frozen=True)
class Look:
    """Common to the figures of one setting: label → style, the setting in words, the footer."""

    styles: dict[str, Style]
    setting: str
    footer: str


@dataclass(frozen=True)
class Curve:
    """One figure of a cell as a line; `spread` names the columns of its interval, `flag` the one that says
    which points are disturbed, and so hollow; hollow: predicted."""

    column: str
    name: str = ""
    spread: tuple[str, str] | None = None
    dashed: bool = False
    hollow: bool = False
    flag: str = ""


def line_of(style: Style, *, label: str = "", dashed: bool = False, hollow: bool = False) -> Line2D:
    """A line, or a handle of a legend, in a style; hollow for predictions and disturbed times."""
    return Line2D(
        [],
        [],
        color=style.colour,
        linestyle="--" if dashed else "-",
        marker=style.marker,
        fillstyle=style.fill,
        markerfacecolor="white" if hollow else style.colour,
        markerfacecoloralt="white",
        label=label,
    )


def label_handles(cells: pd.DataFrame, look: Look, line: Literal["-", ""] = "-") -> list[Artist]:
    """A handle for each label, dense first, then family by family."""
    handles = []
    variant_of = dict(zip(cells["label"], cells["variant"], strict=True))
    for label in sorted(variant_of, key=lambda label: (variant_rank(variant_of[label]), label)):
        handles.append(line_of(look.styles[label], label=label))
        handles[-1].set_linestyle(line)
    return [*handles]


def draw_curve(
    axis: Axes, own: pd.DataFrame, curve: Curve, style: Style, name: str, *, x: str = "seq_len"
) -> None:
    """A line through the cells that have the figure; a single cell is a marker. A band is the interval.

    The line has the name, which `canvas.dress` writes at its end.
    """
    # Only these: to sort all columns of the cells would take longer than to draw the line.
    columns = dict.fromkeys([x, curve.column, *(curve.spread or ()), curve.flag])
    own = own[[name for name in columns if name in own]]
    own = own[own[curve.column] > 0].sort_values(x)
    if own.empty:
        return
    line = line_of(style, label=name, dashed=curve.dashed, hollow=curve.hollow)
    line.set_data(own[x].to_numpy(), own[curve.column].to_numpy())
    if len(own) < 2:
        line.set_linestyle("")
    elif curve.dashed and not curve.hollow:
        line.set_marker("")  # the solid line beside it has the markers
    axis.add_line(line)
    if curve.flag and curve.flag in own:
        flagged = own[own[curve.flag].eq(True)]
        points = line_of(style, hollow=True)
        points.set_linestyle("")
        points.set_data(flagged[x].to_numpy(), flagged[curve.column].to_numpy())
        axis.add_line(points)
    if curve.spread is None or own[list(curve.spread)].isna().all(axis=None):
        return
    places, low, high = own[x], own[curve.spread[0]], own[curve.spread[1]]
    if len(own) > 1:
        axis.fill_between(places, low, high, color=style.colour, alpha=0.2, linewidth=0)
    else:
        axis.vlines(places, low, high, color=style.colour, linewidth=1.2)


def disturbed_note(cells: pd.DataFrame, *columns: str) -> str:
    """The end of a footer that explains hollow points, if any of the columns is true for any cell."""
    return DISTURBED_NOTE if any(cells[name].eq(True).any() for name in columns if name in cells) else ""


def replicates(counts: pd.Series[int]) -> str:
    """'3 replicates', or '1–3 replicates' where cells have different numbers that finished."""
    done = counts[counts > 0]
    if done.empty:
        return "no replicate finished"
    low, high = int(done.min()), int(done.max())
    return f"{low}–{high} replicates" if low < high else f"{high} replicate{'s' if high > 1 else ''}"


def interval_of(counts: pd.Series[int]) -> str:
    """Meaning of a band or a bar over so many replicates; for two it is their range, which covers less."""
    return (
        "range of two"
        if counts.max() == 2
        else "95 % interval" + (" (of two: range)" if 2 in set(counts) else "")
    )


def ring(x: object, y: object, colour: str, label: str = "") -> Line2D:
    """A ring round the point (x, y), or a handle of a legend."""
    at = ([x], [y]) if np.isscalar(x) else (x, y)
    return Line2D(*at, color=colour, marker="o", markersize=10, fillstyle="none", linestyle="", label=label)  # type: ignore[arg-type]
