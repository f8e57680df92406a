"""Names of lines at their right ends, so that nobody must match colours to a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import ConnectionStyle, Rectangle
from scipy.optimize import isotonic_regression

from bench.report.data.intervals import Floats

FONT = 7.5
LINE_HEIGHT = 1.2
"""Distance of the names from each other, in font sizes."""
GUTTER = 1.03
"""Where names begin, in widths of the panel."""
POINTS_PER_INCH = 72


class Leader(ConnectionStyle.Arc3):
    """A straight connection from a name, clipped where it leaves the box around the name.

    matplotlib finds this place by halving, with the transformed path of the box at each step, which took a
    fifth of the time of a figure; the box alone says the same.
    """

    def _in_patch(self, patch: Rectangle) -> Callable[[tuple[float, float]], bool]:
        box = patch.get_bbox()
        return lambda point: box.contains(*point)


def named_lines(axis: Axes) -> dict[str, Line2D]:
    """Name → line of a panel. Of several lines with a name, the one that ends furthest to the right."""
    lines: dict[str, Line2D] = {}
    for line in axis.get_lines():
        name = str(line.get_label())
        nameless = name.startswith("_")  # by a rule of matplotlib
        if nameless or not np.size(np.asarray(line.get_xdata())):
            continue
        if name not in lines or _end(line)[0] > _end(lines[name])[0]:
            lines[name] = line
    return lines


def width_of_names(axes: Sequence[Axes]) -> float:
    """Inches that the longest name of these panels takes."""
    longest = max((len(name) for axis in axes for name in named_lines(axis)), default=0)
    return 0.62 * longest * FONT / POINTS_PER_INCH


def name_ends(figure: Figure, axes: Sequence[Axes]) -> None:
    """Write the name of each named line beside the panel, in the order of their ends, with a leader."""
    notes = {}
    for axis in axes:
        for name, line in named_lines(axis).items():
            colour = str(line.get_color())
            look = {"color": colour, "linewidth": 0.7, "alpha": 0.6}
            course = {"connectionstyle": Leader(), "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3}
            notes[axis, name] = axis.annotate(
                name,
                _end(line),
                xytext=(GUTTER, 0.5),
                textcoords="axes fraction",
                fontsize=FONT,
                color=colour,
                va="center",
                arrowprops={"arrowstyle": "-", **look, **course},
            )
    lay_out(figure)  # the height of a panel follows from it
    for axis in axes:
        own = [(line, notes[axis, name]) for name, line in named_lines(axis).items()]
        if not own:
            continue
        height = axis.bbox.height
        ends = axis.transData.transform([_end(line) for line, _ in own])[:, 1] - axis.bbox.y0
        gap = FONT * LINE_HEIGHT * figure.dpi / POINTS_PER_INCH
        for (_, note), place in zip(own, spread(ends, gap, 0.0, height), strict=True):
            note.set_position((GUTTER, place / height))


def lay_out(figure: Figure) -> None:
    """Place the panels, as drawing would."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def spread(places: Floats, gap: float, low: float, high: float) -> Floats:
    """Places at least `gap` apart, in the same order and as near to `places` as possible.

    They are between `low` and `high`, or around the middle of both where there is too little room.
    """
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    room = high - low - gap * (len(places) - 1)
    start = low + min(room, 0.0) / 2
    moved = np.empty(len(places))
    free = isotonic_regression(places[order] - steps).x
    moved[order] = np.clip(free, start, start + max(room, 0.0)) + steps
    return moved


def _end(line: Line2D) -> tuple[float, float]:
    return float(np.asarray(line.get_xdata())[-1]), float(np.asarray(line.get_ydata())[-1])
