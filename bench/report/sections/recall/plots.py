"""Accuracy against a task's knobs and by distance; guessing dashed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from bench.report.data.groups import split
from bench.report.figures import canvas
from bench.report.figures.families import panel_keys, panel_title
from bench.report.figures.lines import GREY, Look, label_handles, line_of, replicates
from bench.report.figures.style import Style
from bench.report.sections.recall.data import along, beyond, evenly_spaced, trained_apart

ROOM = 0.04
"""Share of the panel that stays free above 100 % and below 0."""


def against(axis_name: str) -> Callable[[pd.DataFrame, Look], Figure | None]:
    """A function that draws accuracy against a knob of the task, or against `seq_len`: a line a variant."""
    return partial(_against, axis_name=axis_name)


def _against(cells: pd.DataFrame, look: Look, *, axis_name: str) -> Figure | None:
    cells = along(cells, axis_name)
    cells = cells[cells["x"].notna()]
    # A length that grows with the knob is no panel of its own.
    follows = cells["seq_len"].nunique() > 1 and not beyond(cells, ["seq_len"], ["x"])
    keys = panel_keys(cells, "rest", trained=trained_apart(cells))
    keys = [key for key in keys if not (key == "seq_len" and follows)]

    def draw(axis: Axes, part: pd.DataFrame) -> None:
        for label, own in part.groupby("label"):
            _line(axis, own.sort_values("x"), "x", look.styles[str(label)], str(label))
        guess = part.groupby("x")["guess_accuracy"].median().dropna()
        if len(guess):
            axis.plot(guess.index, guess, color=GREY, linestyle="--", linewidth=1)
        if (cells["x"] > 0).all():
            axis.set_xscale("log", base=2)
            axis.set_xlim(cells["x"].min() / 1.25, cells["x"].max() * 1.25)
            canvas.lengths_axis(axis.xaxis, part["x"])

    name = "sequence length" if axis_name == "seq_len" else axis_name
    x = "sequence length (tokens)" if axis_name == "seq_len" else axis_name
    return recall_figure(cells, look, keys, draw, f"Accuracy against {name}", x)


def by_distance(cells: pd.DataFrame, look: Look) -> Figure | None:
    """A line a variant over how far back the answer lies, its reach marked; None without distances."""
    cells = cells[_has_distances(cells)]
    if cells.empty:
        return None
    inside = cells["reach"] < cells["seq_len"] - 1

    def draw(axis: Axes, part: pd.DataFrame) -> None:
        edges = [int(edge) for edge in part["distance_edges"].iloc[0]]
        for label, own in part.groupby("label"):
            for _, cell in own.iterrows():
                style = look.styles[str(label)]
                values = _shares(cell)
                x = np.array(cell["distance_edges"], dtype=float)
                line = line_of(style, label=str(label), hollow=bool(cell["leaks"]))
                line.set_data(x[np.isfinite(values)], values[np.isfinite(values)])
                line.set_markersize(4)
                axis.add_line(line)
                if cell["reach"] < cell["seq_len"] - 1:
                    axis.axvline(cell["reach"], color=style.colour, linestyle=":", linewidth=1.4)
        draw_guessing(axis, part)
        axis.autoscale_view()
        if not evenly_spaced(edges):
            axis.set_xscale("log", base=2)
            canvas.lengths_axis(axis.xaxis, edges)

    handles: list[Artist] = []
    if inside.any():
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.4, label="reach of the pattern"))
    title, x = "Accuracy by distance", "tokens back to what is asked for"
    spread = "mean over {}"
    return recall_figure(
        cells,
        look,
        panel_keys(cells, "knobs", trained=trained_apart(cells)),
        draw,
        title,
        x,
        spread=spread,
        handles=handles,
    )


def distance_map(cells: pd.DataFrame, look: Look) -> Figure | None:
    """A row a variant, a column a distance, the colour its accuracy; a bar where the pattern's reach ends."""
    cells = cells[_has_distances(cells)]
    if cells.empty:
        return None
    keys = panel_keys(cells, "knobs", trained=trained_apart(cells))
    parts = [
        (values, own)
        for values, part in split(cells, keys)
        for _, own in part.groupby(part["distance_edges"].map(tuple), sort=False)
    ]
    longest = max(len(part) for _, part in parts)
    figure, axes = canvas.panels(len(parts), width=5.0, height=0.9 + 0.28 * longest, columns=2, sharey=False)
    canvas.widen_for_rows(figure, map(str, cells["label"]), min(len(parts), 2))
    for axis, (values, part) in zip(axes, parts, strict=True):
        axis.set_title(panel_title(values), fontsize=8)
        edges = [int(edge) for edge in part["distance_edges"].iloc[0]]
        shares = np.array([_shares(cell) for _, cell in part.iterrows()])
        image = axis.imshow(shares, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto")
        for row, (_, cell) in enumerate(part.iterrows()):
            for column, share in enumerate(shares[row]):
                if np.isfinite(share):
                    ink = "black" if share > 0.6 else "white"
                    axis.text(
                        column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=ink
                    )
            if cell["reach"] < cell["seq_len"] - 1:
                ends = float(np.searchsorted(edges, cell["reach"], side="right")) - 0.5
                axis.plot([ends, ends], [row - 0.5, row + 0.5], color="#D55E00", linewidth=2.5)
        axis.set_xticks(range(len(edges)), [str(edge) for edge in edges], fontsize=7)
        axis.set_yticks(range(len(part)), [str(label) for label in part["label"]], fontsize=7)
        axis.set_xlabel("tokens back to what is asked for", fontsize=8)
        axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0), shrink=0.8)
    bar.set_label("accuracy", fontsize=8)
    handles: list[Artist] = []
    if (cells["reach"] < cells["seq_len"] - 1).any():
        handles.append(Line2D([], [], color="#D55E00", linewidth=2.5, label="reach of the pattern"))
    footer = f"{look.footer} · per cent, mean over {replicates(cells['replicates'])}"
    canvas.dress(figure, "Accuracy by distance", look.setting, footer, handles)
    return figure


def _shares(cell: pd.Series[Any]) -> npt.NDArray[np.float64]:
    return np.array(cell["accuracy_by_distance"], dtype=float)


def _has_distances(cells: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """The cells that have an accuracy at some distance, with the distance of each accuracy."""

    def has(shares: object, edges: object) -> bool:
        if not isinstance(shares, list) or not isinstance(edges, list) or len(shares) != len(edges):
            return False
        return None not in edges and bool(np.isfinite(np.array(shares, dtype=float)).any())

    pairs = zip(cells["accuracy_by_distance"], cells["distance_edges"], strict=True)
    return np.array([has(*pair) for pair in pairs], dtype=bool)


def draw_guessing(axis: Axes, part: pd.DataFrame) -> None:
    """A dashed line at each accuracy of guessing."""
    for guess in part["guess_accuracy"].dropna().unique():
        axis.axhline(guess, color=GREY, linestyle="--", linewidth=1)


def recall_figure(
    cells: pd.DataFrame,
    look: Look,
    keys: list[str],
    draw: Callable[[Axes, pd.DataFrame], None],
    title: str,
    x: str,
    *,
    line: str = "-",
    spread: str = "mean and min–max over {}",
    handles: list[Artist] | None = None,
) -> Figure | None:
    """A panel for each value of `keys`, drawn by `draw`; None without cells."""
    if cells.empty:
        return None
    parts = list(split(cells, keys))
    figure, axes = canvas.small_panels(len(parts))
    for number, (axis, (values, part)) in enumerate(zip(axes, parts, strict=True)):
        axis.set_title(panel_title(values), fontsize=8)
        draw(axis, part)
        axis.set_ylim(-ROOM, 1 + ROOM)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.tick_params(labelsize=7)
        axis.set_xlabel(x, fontsize=8)
        if number % canvas.SMALL_COLUMNS == 0:
            axis.set_ylabel("accuracy", fontsize=8)
    shown: list[Artist] = [*label_handles(cells, look, line="" if not line else "-"), *(handles or [])]
    if cells["guess_accuracy"].notna().any():
        shown.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="guessing"))
    footer = f"{look.footer} · {spread.format(replicates(cells['replicates']))}"
    canvas.dress(figure, title, look.setting, footer, shown)
    return figure


def _line(axis: Axes, own: pd.DataFrame, x: str, style: Style, name: str) -> None:
    line = line_of(style, label=name, hollow=bool(own["leaks"].any()))
    line.set_data(own[x], own["accuracy_mean"])
    if len(own) < 2:
        line.set_linestyle("")
    axis.add_line(line)
    axis.autoscale_view()
    if (own["replicates"] > 1).any():
        axis.fill_between(
            own[x], own["accuracy_min"], own["accuracy_max"], color=style.colour, alpha=0.2, linewidth=0
        )
