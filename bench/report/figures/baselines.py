"""Baselines in the figures of quality: thin grey lines with a name in the legend."""

from __future__ import annotations

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
"""The baselines that are drawn, with their line styles; the tables have all."""


def draw_baselines(axis: Axes, cells: pd.DataFrame) -> None:
    """Draw each baseline across a panel whose y is bits per byte: the mean over the cells."""
    for column, dashes in DASHES.items():
        value = cells[column].mean()
        if not pd.isna(value):
            axis.axhline(value, color=GREY, linestyle=dashes, linewidth=1, zorder=1)


def baseline_handles(cells: pd.DataFrame) -> list[Artist]:
    """A handle of the legend for each baseline that any cell has."""
    return [
        Line2D([], [], color=GREY, linestyle=dashes, linewidth=1, label=BASELINES[column])
        for column, dashes in DASHES.items()
        if cells[column].notna().any()
    ]


def loss_unit(frame: pd.DataFrame) -> str:
    """Unit in which the losses of these records are drawn: bits per byte for text that is predicted from the
    left, else nats per token."""
    return "bits per byte" if frame["bits_per_byte"].notna().any() else "nats per token"


def in_loss_unit(own: pd.DataFrame) -> pd.Series[float]:
    """The factor of each record from nats per token to the `loss_unit`: that of its whole scored text."""
    return (own["bits_per_byte"] / own["nll"]).where(own["bits_per_byte"].notna(), 1.0)
