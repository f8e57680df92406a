"""Loss as lines, one a variant: along a sequence, by how much history is read, and over training.

A panel is a depth and length, and whatever else was varied of the task and the training. A line is over
replicates, the band their range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report import canvas, units
from bench.report.groups import TRAINING, split, training, varying
from bench.report.lines import GREY, Look, label_handles, line_of, replicates
from bench.report.statistics import LEAK_LIMIT
from bench.report.style import Style

BINS = 48
"""Points of a training curve: each is the mean of the rows between it and the point before."""
Floats = npt.NDArray[np.float64]


class Line(NamedTuple):
    """Points of one variant over its replicates, and the range of these."""

    x: Floats
    y: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class Family:
    """One kind of figure: `line` makes a variant's line of its records, or None where they have none."""

    title: str
    x: str
    y: str
    said: str
    """What a point and the band are, for the footer."""
    line: Callable[[pd.DataFrame], Line | None]
    axis: Callable[[Axes, float], None]
    """Sets the scale of x, up to its largest value."""
    markers: bool = True
    mark: Callable[[Axes, pd.DataFrame, Line, Style], None] | None = None
    """Draws what a line has beside its points."""
    handles: tuple[Artist, ...] = ()


def _draw(frame: pd.DataFrame, look: Look, family: Family) -> Figure | None:
    """A panel a depth, length and training; None where no record has a line."""
    if frame.empty:
        return None
    keys = panel_keys(frame, "knobs")
    parts = list(split(frame, keys))
    figure, axes = canvas.small_panels(len(parts))
    for number, (axis, (values, part)) in enumerate(zip(axes, parts, strict=True)):
        axis.set_title(panel_title(values), fontsize=8)
        largest = 1.0
        for label, own in part.groupby("label"):
            line = family.line(own)
            if line is None:
                continue
            style = look.styles[str(label)]
            leaks = bool((own["leak_max_abs"] > LEAK_LIMIT).any())
            _plot(axis, line, style, markers=family.markers, leaks=leaks, several=len(own) > 1)
            if family.mark is not None:
                family.mark(axis, own, line, style)
            largest = max(largest, float(line.x[-1]))
        family.axis(axis, largest)
        axis.tick_params(labelsize=7)
        axis.set_xlabel(family.x, fontsize=8)
        if number % canvas.SMALL_COLUMNS == 0:
            axis.set_ylabel(family.y, fontsize=8)
    counts = frame.groupby([*keys, "label"], dropna=False)["replicate"].nunique()
    footer = f"{look.footer} · {family.said.format(replicates(counts))}"
    handles = [*label_handles(frame, look), *family.handles]
    canvas.dress(figure, family.title, look.setting, footer, handles)
    return figure


def panel_keys(frame: pd.DataFrame, *more: str, trained: Sequence[str] = TRAINING) -> list[str]:
    """What tells panels apart: depth, length, and `more` and what of the training (`trained`) was varied.

    How state is treated is among them only where one variant does it in several ways.
    """
    keys = [*varying(frame, more), "depth", "seq_len", *varying(frame, trained)]
    if "train_amount" in keys and "train_budget" not in keys:
        keys.append("train_budget")  # says the amount's unit
    if "state_policy" in frame and (frame.groupby("label")["state_policy"].nunique() > 1).any():
        keys.append("state_policy")
    return keys


def panel_title(values: Mapping[str, Any]) -> str:
    """The values of `panel_keys` in words."""
    words = [str(values[key]) for key in ("knobs", "rest") if values.get(key)]
    words.append(f"depth {values['depth']}")
    words += [f"length {units.length(values['seq_len'])}"] if "seq_len" in values else []
    words += training(values, list(values))
    words += [f"state {values[key]}" for key in values if key == "state_policy"]
    return ", ".join(words)


def _plot(axis: Axes, line: Line, style: Style, *, markers: bool, leaks: bool, several: bool) -> None:
    drawn = line_of(style, hollow=leaks)
    drawn.set_data(line.x, line.y)
    drawn.set_markersize(4)
    if not markers:
        drawn.set_markevery(len(line.x) // 6 or 1)
    if len(line.x) < 2:
        drawn.set_linestyle("")
    axis.add_line(drawn)
    axis.autoscale_view()
    if several:
        axis.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.15, linewidth=0)


def _octaves(axis: Axes, largest: float) -> None:
    axis.set_xscale("log", base=2)
    canvas.lengths_axis(axis.xaxis, [2.0**k for k in range(int(np.log2(largest)) + 1)])


def _over_replicates(values: Sequence[Sequence[float]], x: Floats) -> Line | None:
    """Mean and range of lists by replicate, at the x of each element that any replicate has."""
    table = pd.DataFrame(list(values)).astype(float)
    kept = table.notna().any().to_numpy()
    if not kept.any():
        return None
    statistics = (table.mean(), table.min(), table.max())
    return Line(x[: table.shape[1]][kept], *(s.to_numpy()[kept] for s in statistics))


def _with_list(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """The finished records that have the list."""
    taken = [isinstance(value, list) and len(value) > 0 for value in frame[key]]
    return frame[(frame["status"] == "ok") & np.array(taken, dtype=bool)]


def by_position(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss against position in the sequence.

    Bucket k covers positions 2^k − 1 to 2^(k+1) − 2 counted from 0. It is drawn at 2^k, its first
    position counted from 1, because a logarithmic axis has no 0.
    """

    def line(own: pd.DataFrame) -> Line | None:
        return _over_replicates(list(own["nll_by_position"]), np.exp2(np.arange(64)))

    family = Family(
        title="Loss by position in the sequence",
        x="position (from 1, log₂ buckets)",
        y="nats per token",
        said="mean and min–max over {}; a point at x covers [x, 2x)",
        line=line,
        axis=_octaves,
    )
    return _draw(_with_list(frame, "nll_by_position"), look, family)


def by_history(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss on the same targets against how many tokens before them are read.

    Element k is at 2^k tokens, the last at the full history, which is the length of a sequence. A ring is
    round the effective context, the median over replicates.
    """

    def line(own: pd.DataFrame) -> Line | None:
        values = list(own["nll_by_history"])
        x = np.exp2(np.arange(max(len(v) for v in values)))
        x[-1] = own["seq_len"].iloc[0]
        return _over_replicates(values, x)

    def mark(axis: Axes, own: pd.DataFrame, line: Line, style: Style) -> None:
        effective = own["effective_context"].median()
        if not np.isnan(effective):
            at = min(int(np.searchsorted(line.x, effective)), len(line.x) - 1)
            axis.add_line(ring(line.x[at], line.y[at], style.colour))
            axis.autoscale_view()

    family = Family(
        title="Loss by how far back is read",
        x="tokens of history that are read",
        y="nats per token",
        said="mean and min–max over {}; the same targets at every history",
        line=line,
        axis=_octaves,
        mark=mark,
        handles=(ring([], [], GREY, label="effective context"),),
    )
    return _draw(_with_list(frame, "nll_by_history"), look, family)


def ring(x: object, y: object, colour: str, label: str = "") -> Line2D:
    """A ring round the point (x, y), or a handle of a legend."""
    at = ([x], [y]) if np.isscalar(x) else (x, y)
    return Line2D(*at, color=colour, marker="o", markersize=10, fillstyle="none", linestyle="", label=label)  # type: ignore[arg-type]


def training_loss(frame: pd.DataFrame, look: Look) -> Figure | None:
    """Loss of training against tokens; takes `curves.training_curves`."""
    family = Family(
        title="Training loss",
        x="tokens trained on",
        y="nats per target",
        said="median and min–max over {}; a point is the mean of the steps since the one before",
        line=_binned,
        axis=_tokens,
        markers=False,
    )
    return _draw(frame, look, family)


def _tokens(axis: Axes, largest: float) -> None:
    axis.locator_params(axis="x", nbins=4)
    axis.xaxis.set_major_formatter(lambda value, _: units.count(value, short=True))
    axis.set_xlim(0, None)


def _binned(own: pd.DataFrame) -> Line | None:
    """Each curve's mean in equal parts of the tokens of the shortest, then the median over the curves."""
    most = min(float(curve["tokens"].iloc[-1]) for curve in own["curve"])
    edges = np.linspace(0, most, BINS + 1)
    means = []
    for curve in own["curve"]:
        bins = pd.cut(curve["tokens"], edges.tolist(), labels=False)
        means.append(curve["nll"].groupby(bins).mean().reindex(range(BINS)))
    table = pd.DataFrame(means)
    kept = table.notna().any().to_numpy()
    statistics = (table.median(), table.min(), table.max())
    return Line(edges[1:][kept], *(s.to_numpy()[kept] for s in statistics))
