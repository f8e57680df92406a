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
from bench.report.figures.baselines import DASHES, NAMES, UNIGRAM, baseline_handles, line_look
from bench.report.figures.dots import draw_dot, row_panels
from bench.report.figures.lines import GREY, Look, replicates
from bench.report.figures.style import variant_rank
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
    lines = (UNIGRAM, *(DASHES if in_bits else ()))
    cells, beyond = _without_far(cells, lines)
    figure, axes = _dotted(cells, look, f"{unit} (lower is better)", lines)
    for axis in axes:
        axis.locator_params(axis="x", nbins=6)
    footer = f"{look.footer} · mean ± standard deviation, {replicates(cells['quality_replicates'])}{beyond}"
    title = f"{unit.capitalize()} on held-out text"
    canvas.dress(figure, title, look.setting, footer, [*baseline_handles(axes), *_marks(cells)])
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
    canvas.dress(figure, "How far back it looks", look.setting, footer, _marks(cells))
    return figure


def _without_far(cells: pd.DataFrame, columns: Sequence[str]) -> tuple[pd.DataFrame, str]:
    """The cells without baselines so far off that they would squeeze the dots into a corner, and the end of a
    footer that names these."""
    low, high = float(cells["low"].min()), float(cells["high"].max())
    room = FAR * max(high - low, 0.1 * high)
    beyond: dict[str, None] = {}
    for column in columns:
        is_far = ~cells[column].between(low - room, high + room) & cells[column].notna()
        values = cells.loc[is_far, column].round(6).unique()
        beyond |= {f"{NAMES[column]} {units.score(value)}": None for value in values}
        cells = cells.assign(**{column: cells[column].mask(is_far)})
    return cells, f" · beyond the axis: {', '.join(beyond)}" if beyond else ""


def _dotted(
    cells: pd.DataFrame, look: Look, x: str, baselines: Sequence[str] = ()
) -> tuple[Figure, list[Axes]]:
    """A panel a depth, a row a variant and length: a dot at `value`, a bar from `low` to `high`, and a line
    at each of the `baselines`, which are columns."""
    cells = cells.assign(row=_rows(cells))
    order = _order(cells)
    parts = list(split(cells, ["depth"]))
    places = {row[-1]: place for place, row in enumerate(order)}
    figure, axes = row_panels([f"depth {values['depth']}" for values, _ in parts], list(places))
    for axis, (_, part) in zip(axes, parts, strict=True):
        for _, cell in part.iterrows():
            place, style = places[cell["row"]], look.styles[str(cell["label"])]
            draw_dot(axis, place, cell["value"], cell["low"], cell["high"], style, hollow=bool(cell["leaks"]))
            for column in baselines:
                if not pd.isna(at := cell[column]):
                    axis.plot([at, at], [place - 0.5, place + 0.5], **line_look(column))
        for above, below in pairwise(order):
            if above[0] != below[0]:
                axis.axhline(places[below[-1]] - 0.5, color="#bbbbbb", linewidth=0.8)
        axis.set_xlabel(x)
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


def _marks(cells: pd.DataFrame) -> list[Artist]:
    """Handles for the marks of the rows."""
    handles: list[Artist] = []
    if cells["leaks"].any():
        words = f"{LEAK} sees the future"
        handles.append(
            Line2D([], [], color=GREY, marker="o", markerfacecolor="none", linestyle="", label=words)
        )
    if cells["undertrained"].any():
        handles.append(Line2D([], [], linestyle="", label=f"{UNDERTRAINED} undertrained"))
    return handles
