"""Common parts of all figures: panels, log₂ axes with readable ticks, legend, footer, files."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

from bench.report.figures.line_ends import lay_out, name_ends, named_lines, width_of_names
from bench.report.text import units

DPI = 130
"""Pixels an inch of the PNG files."""
COLUMNS = 3
SMALL_COLUMNS = 4
MOST_TICKS = 9
TICK_GAP = 4
"""Pixels between the texts of two ticks."""
MARK_ROW, MOST_MARK_ROWS = 0.05, 8
"""Of the strip above the data for cells that failed: a row's share of the panel, and the number of rows."""
NOTE_HEIGHT = 0.12
"""Height of a line of the footer, in inches."""
TITLE_HEIGHT, TITLE_LINES = 0.17, 3
"""Height of a line of the title, in inches, and the lines for which a figure has room."""
LEGEND = 2.3
"""Space for the legend to the right of the panels, in inches; longer names widen the figure."""
ROW_NAME = 1.9
"""Inches of a panel for the names of rows."""
LETTER, HANDLE = 0.067, 0.55
"""Width of a letter of legends and names of rows, and of all else in a line of a legend, in inches."""


def look() -> AbstractContextManager[None]:
    """The settings every figure is drawn and saved under; the salt makes SVG identifiers repeatable."""
    return matplotlib.rc_context(
        {
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],  # the second is as wide as the first
            "font.size": 9,
            "text.parse_math": False,  # a name with $ in it is a name
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.7,
            "patch.facecolor": "#1f77b4",  # the first of the cycle, which would be looked up for every patch
            "lines.linewidth": 1.6,
            "lines.markersize": 5.5,
            "legend.frameon": False,
            "svg.fonttype": "none",  # text stays text: found by a search, read aloud, and small
            "svg.hashsalt": "bench.report",
        }
    )


def panels(
    count: int, *, width: float = 3.5, height: float = 3.1, sharey: bool = True, columns: int = COLUMNS
) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels side by side, in rows; sizes of a panel in inches."""
    wide = min(count, columns)
    rows = -(-count // wide)
    figure = Figure(figsize=(width * wide + LEGEND, height * rows + 1.1), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, wide, squeeze=False, sharey=sharey)
    axes = [axis for row in grid for axis in row]
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def small_panels(count: int) -> tuple[Figure, list[Axes]]:
    """As `panels`, for figures of which there may be many panels: the fewer, the larger."""
    width, height = (4.4, 3.2) if count == 1 else (3.3, 2.8) if count <= COLUMNS else (2.7, 2.4)
    return panels(count, width=width, height=height, columns=SMALL_COLUMNS)


def widen_for_rows(figure: Figure, names: Iterable[str], columns: int = 1) -> None:
    """Make room for names of rows that are longer than a panel has room for."""
    widest = LETTER * max(map(len, names), default=0)
    figure.set_figwidth(figure.get_figwidth() + columns * max(0.0, widest - ROW_NAME))


def lengths_axis(axis: Axis, values: Iterable[float]) -> None:
    """Set ticks at the lengths; if there are too many, keep every n-th, counted from the longest."""
    descending = sorted(set(values), reverse=True)
    step = -(-len(descending) // MOST_TICKS)
    _set_ticks(axis, descending[::step][::-1], units.length)


def human_axis(
    axis: Axis,
    low: float,
    high: float,
    show: Callable[[float], str],
    *,
    binary: bool,
    zero: bool = False,
    most: int = MOST_TICKS,
) -> None:
    """Round numbers in their unit between low and high: powers of two for bytes, else 1, 2, 5, and at most
    `most` of them; and 0, of an axis that has it."""
    candidates = ([2.0], [4.0], [16.0], [64.0]) if binary else ([1.0, 2.0, 5.0], [1.0, 3.0], [1.0])
    ticks: list[float] = []
    for subs in candidates:
        locator = (
            LogLocator(base=subs[0], numticks=1000) if binary else LogLocator(10, subs=subs, numticks=1000)
        )
        ticks = [float(t) for t in locator.tick_values(low, high) if low <= t <= high]
        if len(ticks) <= most:
            break
    if len(ticks) < 2:  # so narrow that no power falls into it: round numbers of the unit
        unit = 1024.0 ** (np.log2(high) // 10) if binary else 1.0
        round_numbers = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low / unit, high / unit)
        ticks = [t * unit for t in map(float, round_numbers) if low <= t * unit <= high]
    _set_ticks(axis, [0.0, *ticks] if zero else ticks, show)


def even_ticks(high: float, max_ticks: int = 4) -> list[float]:
    """Round numbers of bytes from 0 to `high` at even distances, in the unit that suits `high`."""
    unit = 1024.0 ** (np.log2(max(high, 1.0)) // 10)
    ticks = MaxNLocator(max_ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(0, high / unit)
    return [float(t) * unit for t in ticks if t * unit <= high]


def _set_ticks(axis: Axis, ticks: Sequence[float], show: Callable[[float], str]) -> None:
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def dress(figure: Figure, title: str, setting: str, footer: str, handles: Sequence[Artist]) -> None:
    """Title and setting above, legend to the right of the data, footer below.

    Lines that have a name carry it at their ends; it leaves the legend, which then goes below the data.
    """
    axes = [axis for axis in figure.axes if axis.get_visible()]
    named = {name for axis in axes for name in named_lines(axis)}
    handles = [handle for handle in handles if handle.get_label() not in named]
    if named:
        columns = max(
            place.get_gridspec().ncols for axis in axes if (place := axis.get_subplotspec()) is not None
        )
        figure.set_figwidth(figure.get_figwidth() - LEGEND + columns * (width_of_names(axes) + 0.1))
    legend = max([LEGEND, *(HANDLE + LETTER * len(str(handle.get_label())) for handle in handles)])
    if not named:
        figure.set_figwidth(figure.get_figwidth() + legend - LEGEND)
    wide, high = figure.get_size_inches()
    # Characters that fit beside the legend, at about 14 an inch.
    room = int((wide - (0 if named else legend)) * 14)
    words = [*textwrap.wrap(title, room), *textwrap.wrap(setting, room)]
    high += TITLE_HEIGHT * max(0, len(words) - TITLE_LINES)
    figure.set_figheight(high)
    notes = textwrap.wrap(footer, int(wide * 16))
    rows = 0
    if not named:
        figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    elif handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        fit = max(1, int(wide / (0.65 + 0.075 * longest)))
        rows = -(-len(handles) // fit)
        corner = (0.0, len(notes) * NOTE_HEIGHT / high)
        figure.legend(handles=handles, loc="lower left", bbox_to_anchor=corner, fontsize=8, ncols=fit)
    figure.suptitle("\n".join(words), fontsize=10, x=0.01, ha="left")
    blank = [""] * round((0.1 + 0.18 * rows) / NOTE_HEIGHT if rows else 0)
    figure.supxlabel("\n".join([*blank, *notes]), x=0.01, ha="left", fontsize=7, color="#555555")
    if named:
        name_ends(figure, axes)


def save(figure: Figure, folder: Path, stem: str) -> None:
    """Write stem.png and stem.svg; equal data gives equal SVG files on any date."""
    folder.mkdir(parents=True, exist_ok=True)
    png = io.BytesIO()
    figure.set_dpi(DPI)
    lay_out(figure)
    for axis in figure.axes:
        _thin_out(axis.xaxis)
    figure.set_layout_engine(None)
    figure.savefig(png, format="png", dpi=DPI, pil_kwargs={"compress_level": 0})
    # Flat colours with soft edges: a palette shows the same in a third of the bytes.
    picture = Image.open(png).convert("RGB")
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(folder / f"{stem}.png")
    figure.savefig(folder / f"{stem}.svg", metadata={"Date": None})


def _thin_out(axis: Axis) -> None:
    """Keep every n-th tick, counted from the last, so that no two of their texts run together."""
    low, high = sorted(axis.get_view_interval())
    labels = [one for one in axis.get_ticklabels() if one.get_text() and low <= one.get_position()[0] <= high]
    labels.sort(key=lambda one: one.get_window_extent().x0)  # an axis may run from right to left
    spans = [(box.x0, box.x1) for box in (one.get_window_extent() for one in labels)]
    for step in range(1, len(labels) + 1):
        kept = range(len(labels) - 1, -1, -step)[::-1]
        if all(spans[left][1] + TICK_GAP <= spans[right][0] for left, right in pairwise(kept)):
            break
    if labels and step > 1:
        axis.set_ticks([labels[n].get_position()[0] for n in kept], [labels[n].get_text() for n in kept])
