"""Dot plots of the sizes that fit into a memory budget, and of the throughput at the largest batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.report.data.disturbed import DISTURBED, RATIO_DISTURBED
from bench.report.data.groups import split
from bench.report.figures import canvas
from bench.report.figures.lines import GREY, Look, disturbed_note, interval_of, line_of, replicates
from bench.report.figures.style import Style, strategy_styles
from bench.report.sections.budgets.data import LARGEST, LONGEST
from bench.report.text import units

ROW = 0.075
"""Height of a strategy within a variant's row, in inches."""


@dataclass(frozen=True)
class Dots:
    """A figure of a cell as dots, a row a variant; `end` is where a search for it ends."""

    column: str
    axis: str
    show: Callable[[float], str]
    end: float = math.inf
    binary: bool = True
    linear: bool = False
    spread: tuple[str, str] | None = None
    note: Callable[[pd.Series[float]], str] | None = None
    flag: str = ""
    """The column that says which dots are disturbed, and so hollow."""


def _figure(cells: pd.DataFrame, look: Look, dots: Sequence[Dots], title: str, footer: str) -> Figure | None:
    """A panel for each of `dots` and each depth; None if no cell has any of the figures."""
    if not cells[[d.column for d in dots]].notna().any(axis=None):
        return None
    styles = strategy_styles(cells["activations"])
    names = [str(name) for name in cells["label"].unique()]
    parts = [(values, part, d) for values, part in split(cells, ["depth"]) for d in dots]
    height = 0.8 + len(names) * (0.12 + ROW * 2 * len(styles))
    figure, axes = canvas.panels(len(parts), width=3.6, height=height, columns=max(2, len(dots)))
    for axis, (values, part, d) in zip(axes, parts, strict=True):
        axis.set_title(f"depth {values['depth']}")
        _axis(axis, cells, d)
        for _, cell in part.iterrows():
            place = names.index(str(cell["label"])) + _offset(
                list(styles).index(cell["activations"]), len(styles)
            )
            _dot(axis, cell, d, place, styles[str(cell["activations"])])
        for row in range(1, len(names)):
            axis.axhline(row - 0.5, color="#dddddd", linewidth=0.8)
        axis.grid(axis="y", visible=False)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
    handles: list[Artist] = []
    for name, style in styles.items():
        handles.append(line_of(style, label=name))
        handles[-1].set_linestyle("")  # type: ignore[attr-defined]
    if any((cells[d.column] == 0).any() for d in dots):
        handles.append(Line2D([], [], color=GREY, marker="x", linestyle="", label="nothing fits"))
    canvas.dress(figure, title, look.setting, f"{look.footer} · {footer}", handles)
    return figure


def _offset(place: int, count: int) -> float:
    """Where a strategy lies within a variant's row, from its middle."""
    return 0.8 * ((place + 0.5) / count - 0.5)


def _axis(axis: Axes, cells: pd.DataFrame, dots: Dots) -> None:
    """The scale over the figure in all panels; a logarithmic one has room for notes to the right."""
    columns = [dots.column, *(dots.spread or ())]
    values = cells[columns].where(cells[columns] > 0).to_numpy(dtype=float)
    present = values[~pd.isna(values)]
    low, high = (float(present.min()), float(present.max())) if present.size else (1.0, 2.0)
    if dots.linear:
        room = max(high - low, 0.2)
        axis.set_xlim(low - 0.08 * room, high + 0.08 * room)
        axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: dots.show(value)))
    else:
        room = max(math.log2(high / low), 0.4)
        low, top = low / 2 ** (0.08 * room), high * 2 ** (0.22 * room)
        axis.set_xscale("log", base=2)
        axis.set_xlim(low, top)
        canvas.human_axis(axis.xaxis, low, high * 1.001, dots.show, binary=dots.binary)
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel(dots.axis)


def _dot(axis: Axes, cell: pd.Series[float], dots: Dots, place: float, style: Style) -> None:
    value = float(cell[dots.column])
    if math.isnan(value):
        return
    if value == 0:
        edge = axis.get_yaxis_transform()
        axis.plot(
            [0.012], [place], marker="x", color=style.colour, transform=edge, clip_on=False, markersize=4
        )
        return
    fill = "none" if dots.flag and pd.notna(cell[dots.flag]) and cell[dots.flag] else "full"
    axis.plot(
        [value],
        [place],
        marker=style.marker,
        fillstyle=fill,
        color=style.colour,
        linestyle="",
        markersize=4.5,
    )
    right = value
    if dots.spread is not None:
        low, high = (float(cell[column]) for column in dots.spread)
        if not math.isnan(high):
            right = high
            axis.hlines(place, low, high, color=style.colour, linewidth=1.2)
    words = f"≥ {dots.show(value)}" if value >= dots.end else dots.note(cell) if dots.note else ""
    if words:
        at = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 6}
        axis.annotate(words, (right, place), color=style.colour, **at)  # type: ignore[arg-type]


def longest(cells: pd.DataFrame, look: Look) -> Figure | None:
    """The longest sequence that fits, a panel a depth; takes `fits_cells` of one setting."""
    dots = Dots("longest_seq_len", "longest sequence (tokens)", units.length, end=LONGEST)
    return _figure(cells, look, [dots], "The longest sequence that fits", "predicted")


def largest(cells: pd.DataFrame, look: Look) -> Figure | None:
    """The largest batch that fits at the given length, a panel a depth."""
    dots = Dots("largest_batch_size", "largest batch (sequences)", units.tick, end=LARGEST)
    return _figure(cells, look, [dots], "The largest batch that fits", "predicted")


def payoff(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Throughput at the largest batch that fits and its gain over `keep`, a row of panels a depth."""
    rate = Dots(
        "tokens_per_second",
        "tokens per second",
        lambda value: units.rate(value, short=True),
        binary=False,
        spread=("tokens_per_second_low", "tokens_per_second_high"),
        note=lambda cell: f"batch {cell['largest_batch_size']:,.0f}",
        flag=DISTURBED,
    )
    gain = Dots(
        "gain", "throughput over that of keep", lambda value: f"{value:g}×", linear=True, flag=RATIO_DISTURBED
    )
    counts = cells["replicates"]
    footer = f"median and {interval_of(counts)} over {replicates(counts)}; batch: sequences in a step"
    footer += disturbed_note(cells, DISTURBED, RATIO_DISTURBED)
    title = "Training throughput at the largest batch that fits"
    nothing = cells["largest_batch_size"] == 0
    cells = cells.assign(tokens_per_second=cells["tokens_per_second"].mask(nothing, 0.0))
    return _figure(cells, look, [rate, gain], title, footer)
