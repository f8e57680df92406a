"""Loss as lines, one a variant: along a sequence, by how much history is read, and over training.

A panel is a depth, a length and a value of every other key of the task and the training that varies. A line
is the mean over replicates, the band their range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.data.baselines import with_baselines
from bench.report.data.groups import TRAINING, split, varying
from bench.report.data.statistics import LEAK_LIMIT
from bench.report.figures import canvas
from bench.report.figures.baselines import baseline_handles, draw_baselines
from bench.report.figures.lines import Look, label_handles, line_of, replicates
from bench.report.figures.style import Style
from bench.report.text import units
from bench.report.text.phrases import training

Floats = npt.NDArray[np.float64]


class Line(NamedTuple):
    """Points of one variant over its replicates, and the range of these."""

    x: Floats
    y: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Family:
    """One kind of figure: `line` makes a variant's line of its records, or None where they have none."""

    title: str
    x: str
    y: str
    footer: str
    """Meaning of a point and of the band, for the footer."""
    line: Callable[[pd.DataFrame], Line | None]
    axis: Callable[[Axes, float], None]
    """Sets the scale of x, up to its largest value."""
    markers: bool = True
    mark: Callable[[Axes, pd.DataFrame, Line, Style], None] | None = None
    """Draws additions to a line, such as rings."""
    handles: tuple[Artist, ...] = ()
    baselines: bool = False
    """Draw the baselines of the records, if y is bits per byte."""


def draw_family(frame: pd.DataFrame, look: Look, family: Family) -> Figure | None:
    """A panel a depth, length and training; None where no record has a line."""
    if frame.empty:
        return None
    frame = with_baselines(frame)
    keys = panel_keys(frame, "knobs")
    parts = list(split(frame, keys))
    figure, axes = canvas.small_panels(len(parts))
    for number, (axis, (values, part)) in enumerate(zip(axes, parts, strict=True)):
        axis.set_title(panel_title(values), fontsize=8)
        largest = 1.0
        for label, own in part.groupby("label"):
            line = family.line(own)
            if line is None:
                continue
            style = look.styles[str(label)]
            leaks = bool((own["leak_max_abs"] > LEAK_LIMIT).any())
            _plot(axis, line, style, str(label), markers=family.markers, leaks=leaks, several=len(own) > 1)
            if family.mark is not None:
                family.mark(axis, own, line, style)
            largest = max(largest, float(line.x[-1]))
        if family.baselines:
            draw_baselines(axis, part)
        family.axis(axis, largest)
        axis.tick_params(labelsize=7)
        axis.set_xlabel(family.x, fontsize=8)
        if number % canvas.SMALL_COLUMNS == 0:
            axis.set_ylabel(family.y, fontsize=8)
    counts = frame.groupby([*keys, "label"], dropna=False)["replicate"].nunique()
    footer = f"{look.footer} · {family.footer.format(replicates(counts))}"
    handles = [*label_handles(frame, look), *family.handles]
    if more := baseline_handles(axes):
        handles += more
        footer += "; baselines: mean over the held-out text"
    canvas.dress(figure, family.title, look.setting, footer, handles)
    return figure


def panel_keys(frame: pd.DataFrame, *more: str, trained: Sequence[str] = TRAINING) -> list[str]:
    """Keys that distinguish panels: depth, length, and those of `more` and of the training (`trained`) that
    vary.

    The treatment of state is among them only where one variant has several.
    """
    keys = [*varying(frame, more), "depth", "seq_len", *varying(frame, trained)]
    if "train_amount" in keys and "train_budget" not in keys:
        keys.append("train_budget")  # the unit of the amount
    if "state_policy" in frame and (frame.groupby("label")["state_policy"].nunique() > 1).any():
        keys.append("state_policy")
    return keys


def panel_title(values: Mapping[str, Any]) -> str:
    """The values of `panel_keys` in words."""
    words = [str(values[key]) for key in ("knobs", "rest") if values.get(key)]
    words.append(f"depth {values['depth']}")
    words += [f"length {units.length(values['seq_len'])}"] if "seq_len" in values else []
    words += training(values, list(values))
    words += [f"state {values[key]}" for key in values if key == "state_policy"]
    return ", ".join(words)


def _plot(
    axis: Axes, line: Line, style: Style, name: str, *, markers: bool, leaks: bool, several: bool
) -> None:
    drawn = line_of(style, label=name, hollow=leaks)
    drawn.set_data(line.x, line.y)
    drawn.set_markersize(4)
    if not markers:
        drawn.set_markevery(len(line.x) // 6 or 1)
    if len(line.x) < 2:
        drawn.set_linestyle("")
    axis.add_line(drawn)
    axis.autoscale_view()
    if several:
        axis.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.15, linewidth=0)


def octaves(axis: Axes, largest: float) -> None:
    axis.set_xscale("log", base=2)
    canvas.lengths_axis(axis.xaxis, [2.0**k for k in range(int(np.log2(largest)) + 1)])


def over_replicates(values: Sequence[Sequence[float]], x: Floats) -> Line | None:
    """Mean and range of lists by replicate, at the x of each element that any replicate has."""
    table = pd.DataFrame(list(values)).astype(float)
    has_value = table.notna().any().to_numpy()
    if not has_value.any():
        return None
    statistics = (table.mean(), table.min(), table.max())
    return Line(x[: table.shape[1]][has_value], *(s.to_numpy()[has_value] for s in statistics))
