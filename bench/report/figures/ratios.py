"""Ratios of cost against length, a row of panels a depth and a panel a figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.report.data.crossing import FIGURES, crossing
from bench.report.data.disturbed import RATIO_DISTURBED
from bench.report.data.groups import split, with_lines
from bench.report.figures import canvas
from bench.report.figures.lines import (
    GREY,
    Curve,
    Look,
    disturbed_note,
    draw_curve,
    interval_of,
    label_handles,
    replicates,
    ring,
)
from bench.report.text import units

TITLES = {"time": "step time", "memory": "peak memory", "flops": "executed FLOPs"}


def ratios(cells: pd.DataFrame, look: Look, title: str, y: str, rings: str = "") -> Figure | None:
    """A row of panels a depth, a panel a figure of `crossing.FIGURES`; None for one length.

    With `rings`, their meaning in the legend, a ring marks the last point where a line crosses 1.
    """
    if cells.empty or cells["seq_len"].nunique() < 2:
        return None
    cells = with_lines(cells, "depth", "seq_len")
    counts = cells["rounds"]
    parts = list(split(cells, ["depth"]))
    figure, axes = canvas.panels(len(FIGURES) * len(parts), columns=len(FIGURES), width=3.2, height=2.9)
    for number, axis in enumerate(axes):
        (values, part), name = parts[number // len(FIGURES)], list(FIGURES)[number % len(FIGURES)]
        axis.set_title(f"{TITLES[name]}, depth {values['depth']}")
        axis.axhline(1.0, color=GREY, linewidth=1.0)
        for label, own in part.groupby("label"):
            _line(axis, own.sort_values("seq_len"), name, str(label), look, rings=bool(rings))
    _scales(axes, cells, y)
    handles: list[Artist] = [*label_handles(cells, look)]
    if rings:
        handles.append(ring([], [], GREY, label=rings))
    if (counts > 1).any():
        handles.append(Patch(color=GREY, alpha=0.2, linewidth=0, label=interval_of(counts)))
    footer = f"{look.footer} · {replicates(counts)}{disturbed_note(cells, RATIO_DISTURBED)}"
    canvas.dress(figure, title, look.setting, footer, handles)
    return figure


def _line(axis: Axes, own: pd.DataFrame, name: str, label: str, look: Look, *, rings: bool) -> None:
    column = FIGURES[name]
    own = own[own[column].notna()]
    if own.empty:
        return
    style = look.styles[label]
    ends = (f"{column}_low", f"{column}_high")
    flag = RATIO_DISTURBED if name == "time" else ""
    curve = Curve(column, spread=ends if ends[0] in own else None, flag=flag)
    draw_curve(axis, own, curve, style, label)
    outcome, place = crossing(list(own["seq_len"]), list(own[column]))
    if rings and outcome in ("from", "until"):
        axis.add_line(ring([place], [1.0], style.colour))


def _scales(axes: list[Axes], cells: pd.DataFrame, y: str) -> None:
    """Logarithmic both ways, the same for all panels, with 1 in sight."""
    columns = [f"{name}{end}" for name in FIGURES.values() for end in ("", "_low", "_high")]
    columns = [column for column in columns if column in cells]
    logs = np.log2(cells[columns].to_numpy(dtype=float))
    low, high = min(0.0, float(np.nanmin(logs))), max(0.0, float(np.nanmax(logs)))
    margin = max(0.06 * (high - low), 0.1)
    low, high = 2.0 ** (low - margin), 2.0 ** (high + margin)
    lengths = cells["seq_len"]
    for number, axis in enumerate(axes):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlim(lengths.min() / 1.25, lengths.max() * 1.25)
        axis.set_ylim(low, high)
        canvas.lengths_axis(axis.xaxis, lengths)
        canvas.human_axis(axis.yaxis, low, high, lambda value: f"{units.tick(value)}×", binary=False)
        axis.set_xlabel("sequence length (tokens)")
        if number % len(FIGURES) == 0:
            axis.set_ylabel(y)
