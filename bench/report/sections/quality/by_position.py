"""Loss by position in the sequence, by how far back is read, and by the answer of a dialogue."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.report.data.kinds import with_lists
from bench.report.figures.baselines import in_loss_unit, loss_unit
from bench.report.figures.families import Family, Line, draw_family, octaves, over_replicates
from bench.report.figures.lines import GREY, Look, ring
from bench.report.figures.style import Style


def _losses(own: pd.DataFrame, key: str) -> list[list[float]]:
    """The lists of losses in the `loss_unit`."""
    pairs = zip(own[key], in_loss_unit(own), strict=True)
    return [[np.nan if nats is None else nats * factor for nats in values] for values, factor in pairs]


def by_position(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss against position in the sequence.

    Bucket k covers positions 2^k − 1 to 2^(k+1) − 2 counted from 0. It is drawn at 2^k, its first
    position counted from 1, because a logarithmic axis has no 0.
    """

    def line(own: pd.DataFrame) -> Line | None:
        return over_replicates(_losses(own, "nll_by_position"), np.exp2(np.arange(64)))

    family = Family(
        title="Loss by position in the sequence",
        x="position (from 1, log₂ buckets)",
        y=loss_unit(frame),
        footer="mean and min–max over {}; a point at x covers [x, 2x)",
        baselines=True,
        line=line,
        axis=octaves,
    )
    return draw_family(with_lists(frame, "nll_by_position"), look, family)


def by_answer(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss on the first, second, … answers of dialogues; None where nothing is a dialogue.

    The last point may have later answers too (`bench.tasks.dialogue`).
    """

    def line(own: pd.DataFrame) -> Line | None:
        return over_replicates(_losses(own, "nll_by_answer"), np.arange(1.0, 65.0))

    family = Family(
        title="Loss by answer of a dialogue",
        x="number of the answer in its dialogue",
        y=loss_unit(frame),
        footer="mean and min–max over {}; other dialogues have the later answers",
        baselines=True,
        line=line,
        axis=_numbers,
    )
    return draw_family(with_lists(frame, "nll_by_answer"), look, family)


def _numbers(axis: Axes, largest: float) -> None:
    axis.set_xticks(np.arange(1, largest + 1, max(1, largest // 8)))


def by_history(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss on the same targets against how many tokens before them are read.

    Element k is at 2^k tokens, the last at the full history, which is the length of a sequence. A ring is
    round the effective context, the median over replicates.
    """

    def line(own: pd.DataFrame) -> Line | None:
        values = _losses(own, "nll_by_history")
        x = np.exp2(np.arange(max(len(v) for v in values)))
        x[-1] = own["seq_len"].iloc[0]
        return over_replicates(values, x)

    def mark(axis: Axes, own: pd.DataFrame, line: Line, style: Style) -> None:
        effective = own["effective_context"].median()
        if not np.isnan(effective):
            at = min(int(np.searchsorted(line.x, effective)), len(line.x) - 1)
            axis.add_line(ring(line.x[at], line.y[at], style.colour))
            axis.autoscale_view()

    family = Family(
        title="Loss by how far back is read",
        x="tokens of history that are read",
        y=loss_unit(frame),
        footer="mean and min–max over {}; the same targets at every history",
        baselines=True,
        line=line,
        axis=octaves,
        mark=mark,
        handles=(ring([], [], GREY, label="effective context"),),
    )
    return draw_family(with_lists(frame, "nll_by_history"), look, family)
