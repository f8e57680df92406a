"""Time of a token, state and prompt against the length of the context; a row of panels a depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import split, with_lines
from bench.report.figures import canvas
from bench.report.figures.lines import (
    Curve,
    Look,
    disturbed_note,
    draw_curve,
    label_handles,
    replicates,
)
from bench.report.text import units


class Panel(NamedTuple):
    """A figure of a cell: its column, its title, and how its values are written."""

    column: str
    title: str
    show: Callable[[float], str]
    binary: bool = False


COSTS = (
    Panel("decode_seconds_median", "time a token", lambda value: units.seconds(value, short=True)),
    Panel("decode_state_bytes", "state", lambda value: units.size(value, short=True), binary=True),
    Panel("prefill_seconds_median", "time of the prompt", lambda value: units.seconds(value, short=True)),
)
BATCHES = (
    Panel("decode_largest_batch", "largest batch that fits", units.tick),
    Panel("decode_batch_rate", "tokens a second with it", units.tick),
)


def costs(cells: pd.DataFrame, look: Look) -> Figure | None:
    """What one sequence costs; takes `decoding_cells`. None for one length."""
    return _figure(cells, look, COSTS, "Decoding against the length of the context")


def batches(cells: pd.DataFrame, look: Look) -> Figure | None:
    """What many sequences give; None for one length, or without a budget."""
    return _figure(cells, look, BATCHES, "Decoding with the largest batch that fits")


def _figure(cells: pd.DataFrame, look: Look, wanted: tuple[Panel, ...], title: str) -> Figure | None:
    shown = [panel for panel in wanted if len(cells) and cells[panel.column].notna().any()]
    if not shown or cells["seq_len"].nunique() < 2:
        return None
    cells = with_lines(cells, "depth", "seq_len")
    parts = list(split(cells, ["depth"]))
    figure, axes = canvas.panels(
        len(parts) * len(shown), columns=len(shown), width=3.4, height=2.9, sharey=False
    )
    lengths = cells["seq_len"]
    for number, axis in enumerate(axes):
        (values, part), panel = parts[number // len(shown)], shown[number % len(shown)]
        axis.set_title(f"{panel.title}, depth {values['depth']}")
        flag = DISTURBED if "seconds" in panel.column or "rate" in panel.column else ""
        for label, own in part.groupby("label"):
            draw_curve(axis, own, Curve(panel.column, flag=flag), look.styles[str(label)], str(label))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2 if panel.binary else 10)
        axis.set_xlim(lengths.min() / 1.25, lengths.max() * 1.25)
        axis.autoscale_view(scalex=False)
        canvas.lengths_axis(axis.xaxis, lengths)
        canvas.human_axis(axis.yaxis, *axis.get_ylim(), panel.show, binary=panel.binary)
        axis.set_xlabel("context (tokens)")
    footer = f"{look.footer} · {replicates(cells['replicates'])}{disturbed_note(cells, DISTURBED)}"
    canvas.dress(figure, title, look.setting, footer, label_handles(cells, look))
    return figure
