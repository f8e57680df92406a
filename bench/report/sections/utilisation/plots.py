"""Utilisation of the machine against length; one panel a depth."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import split
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
)


def utilisation(cells: pd.DataFrame, look: Look) -> Figure | None:
    """A line a variant; takes `roofline.utilisation_cells`. None for one length."""
    if cells.empty or cells["seq_len"].nunique() < 2:
        return None
    parts = list(split(cells, ["depth"]))
    figure, axes = canvas.panels(len(parts))
    curve = Curve("utilisation", spread=("utilisation_low", "utilisation_high"), flag=DISTURBED)
    lengths = cells["seq_len"]
    for number, (axis, (values, part)) in enumerate(zip(axes, parts, strict=True)):
        axis.set_title(f"depth {values['depth']}")
        for label, own in part.groupby("label"):
            draw_curve(axis, own, curve, look.styles[str(label)], str(label))
        axis.set_xscale("log", base=2)
        axis.set_xlim(lengths.min() / 1.25, lengths.max() * 1.25)
        canvas.lengths_axis(axis.xaxis, lengths)
        axis.set_xlabel("sequence length (tokens)")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if number % canvas.COLUMNS == 0:
            axis.set_ylabel("algorithmic FLOPs, share of peak")
    top = float(np.nanmax(cells[["utilisation", "utilisation_high"]].to_numpy(dtype=float)))
    for axis in axes:
        axis.set_ylim(0.0, min(1.0, 1.08 * top))
    handles: list[Artist] = label_handles(cells, look)
    if (cells["replicates"] > 1).any():
        handles.append(Patch(color=GREY, alpha=0.2, linewidth=0, label=interval_of(cells["replicates"])))
    title = "Utilisation of the machine's matrix products"
    footer = f"{look.footer} · {replicates(cells['replicates'])}{disturbed_note(cells, DISTURBED)}"
    canvas.dress(figure, title, look.setting, footer, handles)
    return figure
