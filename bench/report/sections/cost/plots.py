"""Cost against sequence length, a panel a depth, and against depth, a panel a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bench.report.data.compared_time import DEVICE, SECONDS, SOURCE
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import split, with_lines
from bench.report.figures import canvas
from bench.report.figures.lines import (
    GREY,
    Curve,
    Look,
    disturbed_note,
    draw_curve,
    interval_of,
    line_of,
    replicates,
)
from bench.report.sections.cost.lost import lost_handles, mark_lost
from bench.report.sections.cost.rows import rows_of_dots
from bench.report.text import units


@dataclass(frozen=True)
class Along:
    """The axis of a cost and the key of its panels: columns of the cells, and their words."""

    x: str
    name: str
    label: str
    panel: str
    heading: Callable[[int], str]


LENGTH = Along("seq_len", "sequence length", "sequence length (tokens)", "depth", "depth {}".format)
DEPTH = Along("depth", "depth", "depth (blocks)", "seq_len", lambda n: f"{units.length(n)} tokens")


@dataclass(frozen=True)
class CostPlot:
    """One kind of figure. `unit` shows a value, `short` for a tick; `binary` asks for powers of two."""

    name: str
    quantity: str
    axis: str
    curves: tuple[Curve, ...]
    unit: Callable[..., str]
    binary: bool = False
    along: Along = LENGTH

    @property
    def stem(self) -> str:
        """The start of its file's name."""
        return self.name if self.along is LENGTH else f"{self.name}_by_depth"

    @property
    def title(self) -> str:
        """The cost and its axis."""
        return f"{self.quantity} against {self.along.name}"

    def draw(self, cells: pd.DataFrame, look: Look) -> Figure | None:
        """The figure; rows of dots where all cells have one length. None where no cell has any of its
        figures, or all have one depth to draw against."""
        along = self.along
        cells = with_lines(with_predictions(cells), along.panel, along.x)
        if not (cells[[curve.column for curve in self.curves]] > 0).any(axis=None):
            return None
        if cells[along.x].nunique() < 2:
            return rows_of_dots(self, cells, look) if along is LENGTH else None
        parts = list(split(cells, [along.panel]))
        figure, axes = canvas.panels(len(parts))
        for axis, (values, part) in zip(axes, parts, strict=True):
            axis.set_title(along.heading(values[along.panel]))
            for label, own in part.groupby("label"):
                for curve in self.curves:
                    draw_curve(axis, own, curve, look.styles[str(label)], str(label), x=along.x)
        lost = cells[cells["finished"] < cells["records"]]
        top = self._axes(
            axes, cells, rows=int(lost.groupby(["depth", "seq_len"]).size().max() or 0) if len(lost) else 0
        )
        for axis, (_, part) in zip(axes, parts, strict=True):
            mark_lost(axis, part, look.styles, top, along.x)
        canvas.dress(figure, self.title, look.setting, self.footer(cells, look), self._legend(cells, look))
        return figure

    def tick(self, value: float) -> str:
        """The text of a tick."""
        return self.unit(value, short=True)

    def limits(self, cells: pd.DataFrame) -> tuple[float, float]:
        """The ends of the axis of the cost."""
        columns = [c for curve in self.curves for c in (curve.column, *(curve.spread or ()))]
        values = np.log2(cells[columns].where(cells[columns] > 0).to_numpy(dtype=float))
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        margin = max(0.06 * (high - low), 0.15)
        return float(2.0 ** (low - margin)), float(2.0 ** (high + margin))

    def named(self, cells: pd.DataFrame) -> list[Curve]:
        """The curves with a name that have figures."""
        return [curve for curve in self.curves if curve.name and cells[curve.column].notna().any()]

    def footer(self, cells: pd.DataFrame, look: Look) -> str:
        """Machine and date, over how many replicates a point is taken, and whether times are the device's or
        disturbed."""
        times = " · times of the device" if (cells[SOURCE] == DEVICE).any() else ""
        note = disturbed_note(cells, *(curve.flag for curve in self.curves if curve.flag))
        return f"{look.footer} · {replicates(cells['replicates'])}{times}{note}"

    def _axes(self, axes: list[Axes], cells: pd.DataFrame, rows: int) -> float:
        """Scales, limits and ticks of all panels; returns the top of the data, in data units.

        Above it a strip stays free for the marks of `rows` cells that did not finish.
        """
        low, top = self.limits(cells)
        strip = 0.02 + canvas.MARK_ROW * min(rows, canvas.MOST_MARK_ROWS) if rows else 0.0
        high = low * (top / low) ** (1 / (1 - strip))
        for number, axis in enumerate(axes):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_ylim(low, high)
            places = cells[self.along.x]
            axis.set_xlim(places.min() / 1.25, places.max() * 1.25)
            canvas.lengths_axis(axis.xaxis, places)
            canvas.human_axis(axis.yaxis, low, top, self.tick, binary=self.binary)
            axis.set_xlabel(self.along.label)
            if number % canvas.COLUMNS == 0:
                axis.set_ylabel(self.axis)
        return top

    def _legend(self, cells: pd.DataFrame, look: Look) -> list[Artist]:
        shown = cells["label"].unique()
        handles: list[Artist] = [line_of(look.styles[label], label=str(label)) for label in shown]
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
            for curve in self.named(cells)
        ]
        handles += lost_handles(cells)
        if any(c.spread for c in self.curves) and (cells["replicates"] > 1).any():
            handles.append(Patch(color=GREY, alpha=0.2, linewidth=0, label=interval_of(cells["replicates"])))
        return handles


def with_predictions(cells: pd.DataFrame) -> pd.DataFrame:
    """Peak memory as two columns: measured, and predicted where it was not measured."""
    source = cells["peak_bytes_source"].astype(object).fillna("").astype(str)
    predicted = cells["peak_bytes_median"].where(source.str.contains("predicted"))
    measured = cells["peak_bytes_median"].where(predicted.isna())
    only = predicted.fillna(cells["peak_bytes_predicted"].where(measured.isna()))
    return cells.assign(peak_measured=measured, peak_only_predicted=only)


BY_LENGTH = (
    CostPlot(
        "step_time",
        "Time of a training step",
        "time of a step",
        (Curve(f"{SECONDS}_median", spread=(f"{SECONDS}_low", f"{SECONDS}_high"), flag=DISTURBED),),
        units.seconds,
    ),
    CostPlot(
        "forward_time",
        "Time of a forward pass",
        "time of a forward pass",
        (
            Curve(
                "forward_seconds_median",
                spread=("forward_seconds_low", "forward_seconds_high"),
                flag=DISTURBED,
            ),
        ),
        units.seconds,
    ),
    CostPlot(
        "peak_memory",
        "Peak memory of a training step",
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
        "FLOPs of a training step",
        "FLOPs of a step",
        (
            Curve("flops_executed_step", "executed"),
            Curve("flops_algorithmic_step", "algorithmic", dashed=True),
        ),
        units.flops,
    ),
)
BY_DEPTH = tuple(replace(plot, along=DEPTH) for plot in BY_LENGTH)
