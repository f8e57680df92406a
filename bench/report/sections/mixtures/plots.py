"""Figures of mixtures against the share of dense layers: a panel a figure, a line a kind of other layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import natural
from bench.report.data.statistics import BASELINE
from bench.report.figures import canvas
from bench.report.figures.lines import GREY, Look, disturbed_note, line_of, replicates
from bench.report.figures.style import Style, styles, variant_rank
from bench.report.sections.mixtures.data import full_cell, holds, panels
from bench.report.sections.mixtures.sources import ACCURACY, BATCH, BITS, OF_DATA, STATE, STEP, TOKEN
from bench.report.sections.mixtures.tables import place, title_of
from bench.report.text import units

BAND = "#e4e4e4"
ROOM = 1.06
"""Top of an axis that begins at 0, over the highest value on it."""
SHOW: dict[str, Callable[[float], str]] = {
    BITS: units.tick,
    ACCURACY: lambda value: f"{100 * value:.0f} %",
    STATE: lambda value: units.size(value, short=True),
    STEP: lambda value: units.seconds(value, short=True),
    TOKEN: lambda value: units.seconds(value, short=True),
    BATCH: lambda value: units.rate(value, short=True),
}
"""Figure → how the ticks of its axis are written."""


def draw(points: pd.DataFrame, look: Look) -> Figure | None:
    """The panels of one machine and depth; takes `mixture_points`. None without any."""
    shown = panels(points)
    if not shown:
        return None
    drawn = pd.concat(shown)
    looks = _looks(drawn)
    figure, axes = canvas.panels(len(shown), width=3.0, height=2.7, sharey=False)
    for axis, own in zip(axes, shown, strict=True):
        name = own["figure"].iloc[0]
        axis.set_title(f"{title_of(own, shown)}\n{place(own)}", fontsize=8)
        _band(axis, own)
        for kind, line in own[own["kind"] != ""].groupby("kind"):
            _line(axis, own, line, looks[str(kind)])
        full = full_cell(own)
        if full is not None:
            _point(axis, full, looks[""])
        _axes(axis, own, name)
    bars = "bars: standard deviation, of step times the 95 % interval (of two: range)"
    footer = f"{look.footer} · {replicates(drawn['replicates'])} · {bars}{disturbed_note(drawn, DISTURBED)}"
    canvas.dress(
        figure, "Mixtures by their share of dense layers", look.setting, footer, _legend(drawn, looks)
    )
    return figure


def _looks(drawn: pd.DataFrame) -> dict[str, Style]:
    """Kind → its style, that of its first member; kinds of one member go lighter."""
    pairs = {(str(member), str(kind)) for member, kind in zip(drawn["member"], drawn["kind"], strict=True)}
    return styles({*pairs, (BASELINE, "")})


def _legend(drawn: pd.DataFrame, looks: dict[str, Style]) -> list[Artist]:
    members = dict(zip(drawn["kind"], drawn["member"], strict=True))
    kinds = sorted(filter(None, members), key=lambda kind: (variant_rank(members[kind]), natural(kind)))
    handles: list[Artist] = []
    if (drawn["kind"] == "").any():
        handles.append(line_of(looks[""], label=BASELINE))
        handles[0].set(linestyle="")
    handles += [line_of(looks[kind], label=kind) for kind in kinds]
    if drawn["doubt"].notna().any():
        handles.append(Patch(color=BAND, label="doubt of a difference"))
    if (drawn["figure"].eq(ACCURACY) & drawn["guess"].notna()).any():
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="guessing"))
    return handles


def _band(axis: Axes, own: pd.DataFrame) -> None:
    """What a difference to dense must exceed, around dense; and the accuracy of guessing."""
    full, doubt = full_cell(own), own["doubt"].max()
    if full is not None and not pd.isna(doubt):
        axis.axhspan(full["value"] - doubt, full["value"] + doubt, color=BAND, zorder=0)
    for guess in own["guess"].dropna().unique():
        axis.axhline(guess, color=GREY, linestyle="--", linewidth=1)


def _line(axis: Axes, pool: pd.DataFrame, own: pd.DataFrame, style: Style) -> None:
    """A marker a mixture; the line goes through the median of each share, and ends at dense."""
    path = own.groupby("share")["value"].median()
    full = full_cell(pool)
    x, y = list(path.index), list(path)
    if full is not None:
        x, y = [*x, 1.0], [*y, full["value"]]
    axis.plot(x, y, color=style.colour, linewidth=1.6)
    for _, row in own.iterrows():
        _point(axis, row, style)


def _point(axis: Axes, row: pd.Series[Any], style: Style) -> None:
    axis.vlines(row["share"], row["low"], row["high"], color=style.colour, linewidth=1.2)
    flag = row["leaks"] if row["figure"] in OF_DATA else row[DISTURBED]
    marker = line_of(style, hollow=holds(flag))
    marker.set_data([row["share"]], [row["value"]])
    axis.add_line(marker)


def _axes(axis: Axes, own: pd.DataFrame, name: str) -> None:
    axis.set_xlim(-0.05, 1.05)
    axis.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axis.set_xlabel("layers that are dense", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.autoscale_view(scalex=False)
    if name == ACCURACY:
        axis.set_ylim(-0.04, 1.04)
    elif name != BITS:
        axis.set_ylim(0, ROOM * own[["value", "high"]].max().max())
    if name == STATE:
        ticks = canvas.even_ticks(axis.get_ylim()[1])
        axis.yaxis.set_major_locator(FixedLocator(ticks))
    else:
        axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: SHOW[name](value) if value else "0"))
