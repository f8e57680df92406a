"""Cost against sequence length: step time, throughput, peak memory, FLOPs; one panel a depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report import canvas, units
from bench.report.groups import split
from bench.report.style import Style

GREY = "#555555"
ROW, MOST_ROWS = 0.05, 8
"""Of the strip for cells that did not finish: a row's share of the panel, and how many rows there are."""
PARTLY = 0.4
"""How strong the × of a cell is that finished in some replicates."""


@dataclass(frozen=True)
class Look:
    """What the figures of one setting share: label → style, the setting in words, the footer."""

    styles: dict[str, Style]
    setting: str
    footer: str


@dataclass(frozen=True)
class Curve:
    """One figure of a cell as a line; `spread` names the columns of its interval; hollow: predicted."""

    column: str
    name: str = ""
    spread: tuple[str, str] | None = None
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class CostPlot:
    """One kind of figure. `unit` shows a value, `short` for a tick; `binary` asks for powers of two."""

    stem: str
    title: str
    axis: str
    curves: tuple[Curve, ...]
    unit: Callable[..., str]
    binary: bool = False
    more_is_better: bool = False

    def draw(self, cells: pd.DataFrame, look: Look) -> Figure | None:
        """The figure, or None where no cell has any of its figures."""
        cells = with_predictions(cells)
        columns = [curve.column for curve in self.curves]
        if not (cells[columns] > 0).any(axis=None):
            return None
        parts = list(split(cells, ["depth"]))
        figure, axes = canvas.panels(len(parts))
        for axis, (values, part) in zip(axes, parts, strict=True):
            axis.set_title(f"depth {values['depth']}")
            for label, own in part.groupby("label"):
                for curve in self.curves:
                    draw_curve(axis, own, curve, look.styles[str(label)])
        lost = cells[cells["finished"] < cells["records"]]
        top = self._axes(
            axes, cells, rows=int(lost.groupby(["depth", "seq_len"]).size().max() or 0) if len(lost) else 0
        )
        for axis, (_, part) in zip(axes, parts, strict=True):
            _failures(axis, part, look.styles, top)
        canvas.dress(figure, self.title, look.setting, _footer(cells, look), self._legend(cells, look))
        return figure

    def _tick(self, value: float) -> str:
        return self.unit(value, short=True)

    def _axes(self, axes: list[Axes], cells: pd.DataFrame, rows: int) -> float:
        """Scales, limits and ticks of all panels; returns the top of the data, in data units.

        Above it a strip stays free for the marks of `rows` cells that did not finish.
        """
        columns = [c for curve in self.curves for c in (curve.column, *(curve.spread or ()))]
        values = np.log2(cells[columns].where(cells[columns] > 0).to_numpy(dtype=float))
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        margin = max(0.06 * (high - low), 0.15)
        low, high = low - margin, high + margin
        strip = 0.02 + ROW * min(rows, MOST_ROWS) if rows else 0.0
        top = high
        high = low + (high - low) / (1 - strip)
        for number, axis in enumerate(axes):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_ylim(2.0**low, 2.0**high)
            lengths = cells["seq_len"]
            axis.set_xlim(lengths.min() / 1.25, lengths.max() * 1.25)
            canvas.lengths_axis(axis.xaxis, lengths)
            canvas.human_axis(axis.yaxis, 2.0**low, 2.0**top, self._tick, binary=self.binary)
            axis.set_xlabel("sequence length (tokens)")
            if number % canvas.COLUMNS == 0:
                axis.set_ylabel(self.axis)
        return float(2.0**top)

    def _legend(self, cells: pd.DataFrame, look: Look) -> list[Artist]:
        shown = cells["label"].unique()
        handles: list[Artist] = [line_of(look.styles[label], label=str(label)) for label in shown]
        drawn = [c for c in self.curves if c.name and cells[c.column].notna().any()]
        handles += [
            Line2D(
                [],
                [],
                color=GREY,
                linestyle="--" if curve.dashed else "-",
                marker="o" if curve.hollow else "",
                markerfacecolor="white",
                label=curve.name,
            )
            for curve in drawn
        ]
        part = (cells["finished"] > 0) & (cells["finished"] < cells["records"])
        if (cells["finished"] == 0).any():
            handles.append(_cross("did not finish"))
        if part.any():
            handles.append(_cross("finished in part", PARTLY))
        if any(c.spread for c in self.curves) and (cells["replicates"] > 1).any():
            handles.append(Patch(color=GREY, alpha=0.2, linewidth=0, label=interval_of(cells["replicates"])))
        return handles


def _cross(label: str, alpha: float = 1.0) -> Line2D:
    return Line2D([], [], color=GREY, marker="x", markeredgewidth=1.8, linestyle="", alpha=alpha, label=label)


def with_predictions(cells: pd.DataFrame) -> pd.DataFrame:
    """Peak memory as two columns: measured, and predicted where it was not measured."""
    source = cells["peak_bytes_source"].astype(object).fillna("").astype(str)
    predicted = cells["peak_bytes_median"].where(source.str.contains("predicted"))
    measured = cells["peak_bytes_median"].where(predicted.isna())
    only = predicted.fillna(cells["peak_bytes_predicted"].where(measured.isna()))
    return cells.assign(peak_measured=measured, peak_only_predicted=only)


def line_of(style: Style, *, label: str = "", dashed: bool = False, hollow: bool = False) -> Line2D:
    """A line, or a handle of a legend, in a style; hollow where it shows predictions."""
    return Line2D(
        [],
        [],
        color=style.colour,
        linestyle="--" if dashed else "-",
        marker=style.marker,
        fillstyle=style.fill,
        markerfacecolor="white" if hollow else style.colour,
        markerfacecoloralt="white",
        label=label,
    )


def label_handles(cells: pd.DataFrame, look: Look, line: Literal["-", ""] = "-") -> list[Artist]:
    """A handle for each label, dense first."""
    handles = []
    for _, label in sorted(set(zip(cells["variant"] != "dense", cells["label"], strict=True))):
        handles.append(line_of(look.styles[label], label=label))
        handles[-1].set_linestyle(line)
    return [*handles]


def draw_curve(axis: Axes, own: pd.DataFrame, curve: Curve, style: Style, *, x: str = "seq_len") -> None:
    """A line through the cells that have the figure; one alone is a marker. A band shows the interval."""
    own = own[own[curve.column] > 0].sort_values(x)
    if own.empty:
        return
    line = line_of(style, dashed=curve.dashed, hollow=curve.hollow)
    line.set_data(own[x].to_numpy(), own[curve.column].to_numpy())
    if len(own) < 2:
        line.set_linestyle("")
    elif curve.dashed and not curve.hollow:
        line.set_marker("")  # the solid line beside it has the markers
    axis.add_line(line)
    if curve.spread is None or own[list(curve.spread)].isna().all(axis=None):
        return
    places, low, high = own[x], own[curve.spread[0]], own[curve.spread[1]]
    if len(own) > 1:
        axis.fill_between(places, low, high, color=style.colour, alpha=0.2, linewidth=0)
    else:
        axis.vlines(places, low, high, color=style.colour, linewidth=1.2)


def _failures(axis: Axes, part: pd.DataFrame, styles: dict[str, Style], top: float) -> None:
    """A × in the strip above the data for each cell that did not finish, one below the other."""
    lost = part[part["finished"] < part["records"]]
    if axis.get_ylim()[1] <= top * 1.001:
        return
    axis.axhline(top, color="#bbbbbb", linewidth=0.8, linestyle=":")
    for x, y, label, whole in _places(lost):
        axis.plot(
            [x],
            [y],
            marker="x",
            markersize=5.5,
            markeredgewidth=1.8,
            alpha=1.0 if whole else PARTLY,
            color=styles[label].colour,
            transform=axis.get_xaxis_transform(),
            clip_on=False,
        )


def _places(lost: pd.DataFrame) -> Iterator[tuple[float, float, str, bool]]:
    """Length, height (share of the panel) and label of each ×, and whether no replicate finished."""
    for length, same in lost.groupby("seq_len"):
        for place, (_, cell) in enumerate(same.sort_values("label").iterrows()):
            height = 0.975 - ROW * (place % MOST_ROWS)
            yield float(str(length)), height, str(cell["label"]), int(cell["finished"]) == 0


def _footer(cells: pd.DataFrame, look: Look) -> str:
    """Machine and date, and over how many replicates a point is taken."""
    return f"{look.footer} · {replicates(cells['replicates'])}"


def replicates(counts: pd.Series[int]) -> str:
    """'3 replicates', or '1–3 replicates' where cells have different numbers that finished."""
    done = counts[counts > 0]
    if done.empty:
        return "no replicate finished"
    low, high = int(done.min()), int(done.max())
    return f"{low}–{high} replicates" if low < high else f"{high} replicate{'s' if high > 1 else ''}"


def interval_of(counts: pd.Series[int]) -> str:
    """What a band or a bar over so many replicates is: of two the range, which covers less."""
    return (
        "range of two"
        if counts.max() == 2
        else "95 % interval" + (" (of two: range)" if 2 in set(counts) else "")
    )


PLOTS = (
    CostPlot(
        "step_time",
        "Time of a training step against sequence length",
        "time of a step",
        (Curve("step_seconds_median", spread=("step_seconds_low", "step_seconds_high")),),
        units.seconds,
    ),
    CostPlot(
        "throughput",
        "Training throughput against sequence length",
        "tokens per second",
        (Curve("tokens_per_second_median", spread=("tokens_per_second_low", "tokens_per_second_high")),),
        units.rate,
        more_is_better=True,
    ),
    CostPlot(
        "peak_memory",
        "Peak memory of a training step against sequence length",
        "peak memory",
        (
            Curve("peak_measured", spread=("peak_bytes_low", "peak_bytes_high")),
            Curve("peak_only_predicted", "predicted", dashed=True, hollow=True),
        ),
        units.size,
        binary=True,
    ),
    CostPlot(
        "flops",
        "FLOPs of a training step against sequence length",
        "FLOPs of a step",
        (
            Curve("flops_executed_step", "executed"),
            Curve("flops_algorithmic_step", "algorithmic", dashed=True),
        ),
        units.flops,
    ),
)
