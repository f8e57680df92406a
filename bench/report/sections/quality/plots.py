"""Quality by variant as dots with error bars: bits per byte, and how far back a model looks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report.data.groups import TRAINING, split, varying
from bench.report.figures import canvas
from bench.report.figures.baselines import DASHES, baseline_handles
from bench.report.figures.lines import GREY, Look, label_handles, replicates
from bench.report.figures.style import Style, variant_rank
from bench.report.text import units
from bench.report.text.cells import label_of
from bench.report.text.marks import LEAK, UNDERTRAINED
from bench.report.text.phrases import training

Row = tuple[int, tuple[int, str, str], str, str]
"""The sort key of a row, which ends with its name."""
FAR = 1.5
"""A baseline further from the dots than this many times their span is noted, not drawn."""


def losses(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Dots with error bars, a row a variant and length, one panel a depth; None without perplexity.

    Of text that is predicted from the left they are bits per byte, else perplexities. The baselines of a row
    are lines across it.
    """
    cells = cells[cells["perplexity_mean"].notna()]
    if cells.empty:
        return None
    in_bits = bool(cells["bits_per_byte_mean"].notna().any())
    name, unit = ("bits_per_byte", "bits per byte") if in_bits else ("perplexity", "perplexity per token")
    deviation, mean = cells[f"{name}_std"].fillna(0.0), cells[f"{name}_mean"]
    unigram = np.log2(cells["unigram_perplexity"]) if in_bits else cells["unigram_perplexity"]
    cells = cells.assign(value=mean, low=mean - deviation, high=mean + deviation, unigram=unigram)
    figure, axes = _dotted(cells, look, f"{unit} (lower is better)")
    for axis in axes:
        axis.locator_params(axis="x", nbins=6)
    _unigram(axes, cells)
    footer = f"{look.footer} · mean ± standard deviation, {replicates(cells['quality_replicates'])}"
    title = f"{unit.capitalize()} on held-out text"
    canvas.dress(figure, title, look.setting, footer, _legend(cells, look, axes[0]) + baseline_handles(cells))
    return figure


def context(cells: pd.DataFrame, look: Look) -> Figure | None:
    """The effective context as dots, its interval over targets as bars; None where it was not taken."""
    cells = cells[cells["effective_context"].notna()]
    if cells.empty:
        return None
    names = {"effective_context": "value", "effective_context_low": "low", "effective_context_high": "high"}
    cells = cells.rename(columns=names)
    figure, axes = _dotted(cells, look, "tokens of history that are used")
    lengths = [length for name in names.values() for length in cells[name].dropna()]
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xlim(min(lengths) / 1.25, max(lengths) * 1.25)
        canvas.lengths_axis(axis.xaxis, 2.0 ** np.arange(0, np.log2(max(lengths)) + 1))
    footer = f"{look.footer} · median and widest 95 % interval over {replicates(cells['quality_replicates'])}"
    canvas.dress(figure, "How far back it looks", look.setting, footer, _legend(cells, look, axes[0]))
    return figure


def _dotted(cells: pd.DataFrame, look: Look, x: str) -> tuple[Figure, list[Axes]]:
    """A panel a depth, a row a variant and length: a dot at `value`, a bar from `low` to `high`."""
    cells = cells.assign(row=_rows(cells))
    order = _order(cells)
    parts = list(split(cells, ["depth"]))
    figure, axes = canvas.panels(len(parts), width=3.2, height=0.6 + 0.2 * len(order), columns=4)
    for axis, (values, part) in zip(axes, parts, strict=True):
        axis.set_title(f"depth {values['depth']}")
        _dots(axis, part, order, look.styles)
        axis.set_xlabel(x)
    axes[0].set_yticks(range(len(order)), [row[-1] for row in order], fontsize=8)
    canvas.widen_for_rows(figure, (row[-1] for row in order))
    axes[0].set_ylim(len(order) - 0.4, -0.6)
    return figure, axes


def _rows(cells: pd.DataFrame) -> list[str]:
    """Each cell's row name: label and length, and training and state policy if there are several."""
    varying_keys = varying(cells, TRAINING)
    policies = cells.groupby("label")["state_policy"].nunique(dropna=False)
    names = []
    for _, cell in cells.iterrows():
        words = [label_of(cell), units.length(cell["seq_len"])]
        words += training({str(key): value for key, value in cell.items()}, varying_keys)
        if policies[cell["label"]] > 1:
            words.append(str(cell["state_policy"]))
        names.append(" · ".join(words))
    return names


def _order(cells: pd.DataFrame) -> list[Row]:
    """The rows from top to bottom: by length, dense first, then family by family."""
    return sorted(
        {
            (int(c["seq_len"]), variant_rank(str(c["variant"])), str(c["label"]), str(c["row"]))
            for _, c in cells.iterrows()
        }
    )


def _dots(axis: Axes, part: pd.DataFrame, order: Sequence[Row], styles: dict[str, Style]) -> None:
    places = {row[-1]: place for place, row in enumerate(order)}
    for _, cell in part.iterrows():
        style = styles[str(cell["label"])]
        axis.errorbar(
            [cell["value"]],
            [places[cell["row"]]],
            # an end on the wrong side of the middle leaves no whisker
            xerr=[[max(0.0, cell["value"] - cell["low"])], [max(0.0, cell["high"] - cell["value"])]],
            color=style.colour,
            marker=style.marker,
            fillstyle="none" if cell["leaks"] else style.fill,
            markerfacecoloralt="white",
            capsize=2.5,
            linestyle="",
        )
        for column, dashes in DASHES.items():
            at, row = cell[column], places[cell["row"]]
            axis.plot([at, at], [row - 0.5, row + 0.5], color=GREY, linestyle=dashes, linewidth=1, zorder=1)
    for above, below in pairwise(order):
        if above[0] != below[0]:
            axis.axhline(places[below[-1]] - 0.5, color="#bbbbbb", linewidth=0.8)
    axis.grid(axis="y", visible=False)


def _unigram(axes: Sequence[Axes], cells: pd.DataFrame) -> None:
    """The unigram baseline as a line; where it lies so far off that it would squeeze the dots
    into a corner, as a note at the edge it lies beyond.
    """
    low, high = float(cells["low"].min()), float(cells["high"].max())
    span = max(high - low, 0.1 * high)
    for value in cells["unigram"].dropna().round(6).unique():
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
            Line2D(
                [],
                [],
                color=GREY,
                marker="o",
                fillstyle="none",
                linestyle="",
                label=f"{LEAK} sees the future",
            )
        )
    if cells["undertrained"].any():
        handles.append(Line2D([], [], linestyle="", label=f"{UNDERTRAINED} undertrained"))
    return handles
