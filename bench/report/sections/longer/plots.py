"""Loss by position in sequences that are longer than those of training, a line a variant."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from bench.report.figures.baselines import in_loss_unit, loss_unit
from bench.report.figures.families import Family, Line, draw_family, over_replicates
from bench.report.figures.lines import GREY, Look
from bench.report.figures.style import Style
from bench.report.text import units

TRAINED = "trained length"
"""The name of the line at the trained length, in the legend and as its id."""
DASHES = (0, (5, 3))


def by_position(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss against position in the longest windows, on a linear axis; takes records with that list.

    A point is the mean of a part of the positions, drawn at the middle of the part. A vertical line is at the
    trained length.
    """
    family = Family(
        title="Loss by position in sequences longer than in training",
        x="position in the sequence",
        y=loss_unit(frame) if len(frame) else "",
        footer="mean and min–max over {}; a point is the mean of a quarter of the trained length; each point "
        "has its own text, which is the same for all variants",
        line=_line,
        axis=_lengths,
        mark=_mark,
        handles=(Line2D([], [], color=GREY, linestyle=DASHES, linewidth=1, label=TRAINED),),
    )
    return draw_family(frame, look, family)


def _line(own: pd.DataFrame) -> Line | None:
    """None where no record says how long its longest sequences are."""
    longest = max((n for lengths in own["longer_lengths"] for n in lengths if n is not None), default=None)
    if longest is None:
        return None
    values = [
        [np.nan if nats is None else nats * factor for nats in losses]
        for losses, factor in zip(own["nll_longer_by_position"], in_loss_unit(own), strict=True)
    ]
    parts = max(map(len, values))
    return over_replicates(values, (np.arange(parts) + 0.5) * longest / parts)


def _mark(axis: Axes, own: pd.DataFrame, line: Line, style: Style) -> None:
    """A vertical line at the trained length, once in a panel."""
    if not any(drawn.get_gid() == TRAINED for drawn in axis.get_lines()):
        at = float(own["seq_len"].iloc[0])
        axis.axvline(at, color=GREY, linestyle=DASHES, linewidth=1, zorder=1, gid=TRAINED)


def _lengths(axis: Axes, largest: float) -> None:
    """Ticks at the trained length and its multiples 2, 4, …"""
    marks = [line for line in axis.get_lines() if line.get_gid() == TRAINED]
    trained = float(np.asarray(marks[0].get_xdata())[0]) if marks else largest
    powers = int(np.ceil(np.log2(max(1.0, largest / trained))))
    axis.xaxis.set_major_locator(FixedLocator([0.0, *(trained * 2**k for k in range(powers + 1))]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.length(value)))
    axis.set_xlim(0, trained * 2**powers)
