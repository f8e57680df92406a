"""A search over learning rates as a picture: quality against the rate, a line a variant, its best ringed."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.report.data.groups import split
from bench.report.figures import canvas
from bench.report.figures.baselines import baseline_handles, draw_baselines
from bench.report.figures.families import panel_keys, panel_title
from bench.report.figures.lines import GREY, Look, label_handles, line_of, replicates, ring
from bench.report.figures.style import Style
from bench.report.text import units

FIGURES = {"bits_per_byte": "bits per byte", "perplexity": "perplexity", "accuracy": "accuracy"}
"""Figures of quality in words; the first that there is is drawn."""
WIDE = 3.0
"""Perplexities that differ by more than this factor are drawn on a logarithmic axis."""


def by_rate(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Bits per byte, else perplexity, else accuracy, against the learning rate; takes `rate_cells`.

    A × at the upper edge is a rate at which a replicate diverged.
    """
    if cells.empty:
        return None
    name = next((n for n in FIGURES if cells[f"{n}_mean"].notna().any()), "accuracy")
    keys = [key for key in panel_keys(cells) if key != "learning_rate"]
    parts = list(split(cells, keys))
    figure, axes = canvas.small_panels(len(parts))
    values = cells[f"{name}_mean"]
    wide = name == "perplexity" and bool(values.max() > WIDE * values.min())
    lost = cells[cells["diverged"] > 0].groupby([*keys, "learning_rate"], dropna=False).size()
    rows = int(lost.max()) if len(lost) else 0
    for number, (axis, (where, part)) in enumerate(zip(axes, parts, strict=True)):
        axis.set_title(panel_title(where), fontsize=8)
        _diverged(axis, part, look.styles)
        for label, own in part.groupby("label"):
            _rates(axis, own.sort_values("learning_rate"), name, look.styles[str(label)], str(label))
        if name == "bits_per_byte":
            draw_baselines(axis, part)
        _axes(axis, cells["learning_rate"])
        if wide:
            axis.set_yscale("log", base=10)
        axis.set_xlabel("learning rate", fontsize=8)
        if number % canvas.SMALL_COLUMNS == 0:
            axis.set_ylabel(FIGURES[name], fontsize=8)
    _room_above(axes[0], rows)
    if wide:
        for axis in axes:
            canvas.human_axis(axis.yaxis, *axis.get_ylim(), units.tick, binary=False)
    handles: list[Artist] = [*label_handles(cells, look), ring([], [], GREY, label="least loss")]
    handles += baseline_handles(axes)
    if (cells["diverged"] > 0).any():
        handles.append(Line2D([], [], color=GREY, marker="x", linestyle="", label="a replicate diverged"))
    footer = f"{look.footer} · mean ± standard deviation, {replicates(cells['replicates'].fillna(0))}"
    title = f"{FIGURES[name].capitalize()} by learning rate"
    canvas.dress(figure, title, look.setting, footer, handles)
    return figure


def _diverged(axis: Axes, part: pd.DataFrame, styles: dict[str, Style]) -> None:
    """A × at the upper edge for each rate of a variant, one below the other."""
    for _, same in part[part["diverged"] > 0].groupby("learning_rate"):
        for place, label in enumerate(same["label"]):
            axis.plot(
                same["learning_rate"].iloc[:1],
                [0.98 - canvas.MARK_ROW * (place % canvas.MOST_MARK_ROWS)],
                marker="x",
                markeredgewidth=1.8,
                linestyle="",
                color=styles[label].colour,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
            )


def _room_above(axis: Axes, rows: int) -> None:
    """Leave that many rows of marks free above the data, in all panels, which share the scale."""
    if rows:
        scale = axis.yaxis.get_transform()
        low, high = scale.transform(np.array(axis.get_ylim()))
        top = low + (high - low) / (1 - canvas.MARK_ROW * min(rows, canvas.MOST_MARK_ROWS))
        axis.set_ylim(top=float(scale.inverted().transform(np.array([top]))[0]))


def _rates(axis: Axes, own: pd.DataFrame, name: str, style: Style, label: str) -> None:
    own = own[own[f"{name}_mean"].notna()]
    if own.empty:
        return
    x, y = own["learning_rate"].to_numpy(), own[f"{name}_mean"].to_numpy()
    line = line_of(style, label=label, hollow=bool(own["leaks"].any()))
    line.set_data(x, y)
    axis.add_line(line)
    deviation = own[f"{name}_std"].fillna(0.0).to_numpy()
    if np.any(deviation > 0):
        axis.fill_between(x, y - deviation, y + deviation, color=style.colour, alpha=0.15, linewidth=0)
    for _, best in own[own["best"]].iterrows():
        axis.add_line(ring(best["learning_rate"], best[f"{name}_mean"], style.colour))
    axis.autoscale_view()


def _axes(axis: Axes, rates: pd.Series[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(rates.min() / 1.25, rates.max() * 1.25)
    axis.xaxis.set_major_locator(FixedLocator(sorted(rates.unique())))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.learning_rate(value)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(labelsize=7)
