"""Quality: perplexity by variant as dots with error bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report import canvas, units
from bench.report.cost_plots import GREY, Look, label_handles, replicates
from bench.report.groups import TRAINING, split, training, varying
from bench.report.style import Style

FAR = 1.5
"""A baseline further from the dots than this many times their span is noted, not drawn."""


def perplexity(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Dots with error bars, a row a variant and length, one panel a depth; None without perplexity."""
    cells = cells[cells["perplexity_mean"].notna()]
    if cells.empty:
        return None
    cells = cells.assign(row=_rows(cells))
    order = _order(cells)
    parts = list(split(cells, ["depth"]))
    height = 0.6 + 0.2 * len(order)
    figure, axes = canvas.panels(len(parts), width=3.2, height=height, columns=4)
    for axis, (values, part) in zip(axes, parts, strict=True):
        axis.set_title(f"depth {values['depth']}")
        _dots(axis, part, order, look.styles)
        axis.locator_params(axis="x", nbins=6)
        axis.set_xlabel("perplexity per token (lower is better)")
    _baseline(axes, cells)
    base = axes[0]
    base.set_yticks(range(len(order)), [row[-1] for row in order], fontsize=8)
    base.set_ylim(len(order) - 0.4, -0.6)
    footer = f"{look.footer} · mean ± standard deviation, {replicates(cells['quality_replicates'])}"
    canvas.dress(figure, "Perplexity on held-out text", look.setting, footer, _legend(cells, look, axes[0]))
    return figure


def _rows(cells: pd.DataFrame) -> list[str]:
    """Each cell's row name: label and length, and training and state policy where there are several."""
    apart = varying(cells, TRAINING)
    policies = cells.groupby("label")["state_policy"].nunique(dropna=False)
    names = []
    for _, cell in cells.iterrows():
        words = [f"{cell['label']}{'†' if cell['leaks'] else ''}", units.length(cell["seq_len"])]
        words += training({str(key): value for key, value in cell.items()}, apart)
        if policies[cell["label"]] > 1:
            words.append(str(cell["state_policy"]))
        names.append(" · ".join(words))
    return names


def _order(cells: pd.DataFrame) -> list[tuple[int, bool, str, str]]:
    """The rows from top to bottom: by length, dense first, then by name."""
    return sorted(
        {
            (int(c["seq_len"]), c["variant"] != "dense", str(c["label"]), str(c["row"]))
            for _, c in cells.iterrows()
        }
    )


def _dots(
    axis: Axes, part: pd.DataFrame, order: Sequence[tuple[int, bool, str, str]], styles: dict[str, Style]
) -> None:
    places = {row[-1]: place for place, row in enumerate(order)}
    for _, cell in part.iterrows():
        style = styles[str(cell["label"])]
        deviation = 0.0 if math.isnan(cell["perplexity_std"]) else float(cell["perplexity_std"])
        axis.errorbar(
            [cell["perplexity_mean"]],
            [places[cell["row"]]],
            xerr=[deviation],
            color=style.colour,
            marker=style.marker,
            fillstyle="none" if cell["leaks"] else style.fill,
            markerfacecoloralt="white",
            capsize=2.5,
            linestyle="",
        )
    for above, below in pairwise(order):
        if above[0] != below[0]:
            axis.axhline(places[below[-1]] - 0.5, color="#bbbbbb", linewidth=0.8)
    axis.grid(axis="y", visible=False)


def _baseline(axes: Sequence[Axes], cells: pd.DataFrame) -> None:
    """The unigram baseline as a line; where it lies so far off that it would squeeze the dots
    into a corner, as a note at the edge it lies beyond.
    """
    deviation = cells["perplexity_std"].fillna(0)
    low = float((cells["perplexity_mean"] - deviation).min())
    high = float((cells["perplexity_mean"] + deviation).max())
    span = max(high - low, 0.1 * high)
    for value in cells["unigram_perplexity"].dropna().round(6).unique():
        far = value > high + FAR * span or value < low - FAR * span
        for axis in axes:
            if far:
                note = (
                    f"unigram {units.score(value)} →" if value > high else f"← unigram {units.score(value)}"
                )
                axis.set_title(note, loc="right" if value > high else "left", fontsize=7, color=GREY)
            else:
                axis.axvline(value, color=GREY, linestyle="--", linewidth=1)


def _legend(cells: pd.DataFrame, look: Look, axis: Axes) -> list[Artist]:
    handles = label_handles(cells, look, line="")
    if any(line.get_linestyle() == "--" for line in axis.get_lines()):
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="unigram"))
    if cells["leaks"].any():
        handles.append(
            Line2D([], [], color=GREY, marker="o", fillstyle="none", linestyle="", label="† sees the future")
        )
    return handles
