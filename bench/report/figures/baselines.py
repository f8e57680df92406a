"""Baselines in the figures of quality: thin grey lines with a name in the legend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from bench.report.data.baselines import BASELINES
from bench.report.figures.lines import GREY

DASHES: dict[str, Any] = {
    "ngram_3_bits_per_byte": ":",
    "ngram_5_bits_per_byte": "-.",
    "gzip_bits_per_byte": (0, (8, 3)),
}
"""The baselines that are drawn in bits per byte, with their line styles; the tables have all."""
UNIGRAM = "unigram"
"""The baseline that is also drawn in the unit of other losses."""
NAMES = {UNIGRAM: UNIGRAM, **{column: BASELINES[column] for column in DASHES}}


def draw_baselines(axis: Axes, cells: pd.DataFrame) -> None:
    """Draw each baseline across a panel whose y is bits per byte: the mean over the cells."""
    for column in DASHES:
        value = cells[column].mean()
        if not pd.isna(value):
            axis.axhline(value, **line_look(column))


def line_look(column: str) -> dict[str, Any]:
    """The look of a baseline's line; its gid is the column."""
    dashes = {UNIGRAM: "--", **DASHES}[column]
    return {"color": GREY, "linestyle": dashes, "linewidth": 1, "zorder": 1, "gid": column}


def baseline_handles(axes: Iterable[Axes]) -> list[Artist]:
    """A handle of the legend for each baseline that is drawn in any of the panels."""
    drawn = {line.get_gid() for axis in axes for line in axis.get_lines()}
    return [
        Line2D([], [], label=name, **line_look(column)) for column, name in NAMES.items() if column in drawn
    ]


def loss_unit(frame: pd.DataFrame) -> str:
    """Unit in which the losses of these records are drawn: bits per byte for text that is predicted from the
    left, else nats per token."""
    return "bits per byte" if frame["bits_per_byte"].notna().any() else "nats per token"


def in_loss_unit(own: pd.DataFrame) -> pd.Series[float]:
    """The factor of each record from nats per token to the `loss_unit`: that of its whole scored text."""
    return (own["bits_per_byte"] / own["nll"]).where(own["bits_per_byte"].notna(), 1.0)
