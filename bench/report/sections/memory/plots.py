"""Memory by activation strategy: the parts of the peak, and its growth with depth.

If an experiment has several strategies, a panel is a variant and has the strategies; if it has one, a single
panel has the variants.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.report.data.kinds import predicted
from bench.report.figures import canvas
from bench.report.figures.lines import Curve, Look, draw_curve, line_of, replicates
from bench.report.figures.style import Style, strategy_rank, strategy_styles
from bench.report.sections.memory.data import PARTS, shared
from bench.report.text import units
from bench.report.text.marks import PREDICTED

COLOURS = {
    "param_bytes": "#4477AA",
    "optimizer_bytes": "#88CCEE",
    "peak_grad_bytes": "#CC9933",
    "peak_activation_bytes": "#D55E00",
    "peak_workspace_bytes": "#BBBBBB",
}
COLUMNS = 4
FEWEST_DEPTHS = 3


def _facets(cells: pd.DataFrame) -> tuple[list[tuple[str, pd.DataFrame]], str]:
    """The panels, each a title and its cells, and the column by which a panel's contents differ."""
    strategies = cells["activations"].unique()
    if len(strategies) < 2:
        return [(f"activations {strategies[0]}", cells)], "label"
    return [(str(label), own) for label, own in cells.groupby("label", sort=False)], "activations"


def _setting(cells: pd.DataFrame, look: Look, *, depth: bool = True) -> str:
    words = [look.setting, f"length {units.length(cells['seq_len'].iloc[0])}"]
    return ", ".join([*words, *([f"depth {cells['depth'].iloc[0]}"] if depth else [])])


def waterfall(parts: pd.DataFrame, look: Look) -> Figure | None:
    """Stacked bars of the parts of the peak, at the longest length and greatest depth shared.

    Takes `peak_parts` of one setting; the end of a bar shows the peak and its phase.
    """
    if parts.empty:
        return None
    cells = shared(parts)
    panels, key = _facets(cells)
    names = _names(cells, key)
    height = 0.75 + 0.24 * len(names)
    wide = {"width": 3.1, "columns": COLUMNS} if len(panels) > 1 else {"width": 6.0, "columns": 1}
    figure, axes = canvas.panels(len(panels), height=height, **wide)  # type: ignore[arg-type]
    longest = float(cells[list(PARTS)].sum(axis=1).max())
    for number, (axis, (title, own)) in enumerate(zip(axes, panels, strict=True)):
        axis.set_title(title)
        _bars(axis, own, key, names, longest)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.4, -0.6)
        if len(panels) - number <= COLUMNS:
            axis.set_xlabel("live at the peak")
    handles: list[Artist] = [Patch(color=COLOURS[part], label=name) for part, name in PARTS.items()]
    footer = f"{look.footer} · at the end of a bar: the peak and the phase it falls in"
    footer += f"; {PREDICTED} predicted" if cells["predicted"].any() else ""
    title = "What the peak memory of a training step is made of"
    canvas.dress(figure, title, _setting(cells, look), footer, handles)
    return figure


def _names(cells: pd.DataFrame, key: str) -> list[str]:
    """The bars from top to bottom: strategies in their order, or variants as they come."""
    names = [str(name) for name in cells[key].unique()]
    return sorted(names, key=lambda name: (strategy_rank(name), name)) if key == "activations" else names


def _bars(axis: Axes, own: pd.DataFrame, key: str, names: list[str], longest: float) -> None:
    for _, cell in own.iterrows():
        place, left = names.index(str(cell[key])), 0.0
        for part in PARTS:
            axis.barh(place, cell[part], left=left, height=0.72, color=COLOURS[part], linewidth=0)
            left += float(cell[part])
        mark = PREDICTED if cell["predicted"] else ""
        words = ", ".join(w for w in (units.size(left) + mark, str(cell["peak_phase"])) if w)
        axis.text(left + 0.015 * longest, place, words, va="center", fontsize=6.5)
    axis.set_xlim(0, longest * 1.55)
    ticks = canvas.even_ticks(longest)
    axis.set_xticks(ticks, [units.size(tick, short=True) for tick in ticks], fontsize=7)
    axis.grid(axis="y", visible=False)


def activations_by_depth(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Activations saved by the forward pass, against depth."""
    title = "Activations saved for the backward pass against depth"
    return _by_depth(cells, look, title, "saved activations", "activation_bytes")


def peak_by_depth(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Peak memory of a step, against depth."""
    title = "Peak memory of a training step against depth"
    return _by_depth(cells, look, title, "peak memory", "peak_bytes_median")


def _by_depth(cells: pd.DataFrame, look: Look, title: str, name: str, figure_of: str) -> Figure | None:
    """Lines over depth at the longest length that has enough depths; None where none has."""
    cells = _measured_and_predicted(cells, figure_of)
    cells = cells[cells[["measured", "only_predicted"]].notna().any(axis=1)]
    depths = cells.groupby("seq_len")["depth"].nunique()
    lengths = depths.index[depths >= FEWEST_DEPTHS]
    if lengths.empty:
        return None
    cells = cells[cells["seq_len"] == lengths.max()]
    panels, key = _facets(cells)
    styles: dict[str, Style] = look.styles if key == "label" else strategy_styles(cells["activations"])
    several = len(panels) > 1
    figure, axes = canvas.panels(
        len(panels), width=2.5 if several else 4.5, height=2.3 if several else 3.4, columns=COLUMNS
    )
    curves = (Curve("measured"), Curve("only_predicted", dashed=True, hollow=True))
    values = np.log2(cells[["measured", "only_predicted"]].to_numpy(dtype=float))
    low, high = 2.0 ** (np.nanmin(values) - 0.3), 2.0 ** (np.nanmax(values) + 0.3)
    for number, (axis, (panel, own)) in enumerate(zip(axes, panels, strict=True)):
        axis.set_title(panel)
        for line, part in own.groupby(key, sort=False):
            for curve in curves:
                draw_curve(axis, part, curve, styles[str(line)], str(line), x="depth")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlim(cells["depth"].min() / 1.25, cells["depth"].max() * 1.25)
        axis.set_ylim(low, high)
        canvas.lengths_axis(axis.xaxis, cells["depth"])
        canvas.human_axis(axis.yaxis, low, high, lambda value: units.size(value, short=True), binary=True)
        if len(panels) - number <= COLUMNS:
            axis.set_xlabel("depth (blocks)")
        if number % COLUMNS == 0:
            axis.set_ylabel(name)
    handles: list[Artist] = [line_of(styles[n], label=n) for n in _names(cells, key)]
    if cells["only_predicted"].notna().any():
        grey = Style("#555555", "o", "full")
        handles.append(line_of(grey, label="predicted", dashed=True, hollow=True))
    footer = f"{look.footer} · {replicates(cells['replicates'])}"
    canvas.dress(figure, title, _setting(cells, look, depth=False), footer, handles)
    return figure


def _measured_and_predicted(cells: pd.DataFrame, figure_of: str) -> pd.DataFrame:
    """The figure as two columns: measured, and predicted where it was not. Zero is not drawn."""
    values = cells[figure_of].where(cells[figure_of] > 0)
    source: pd.Series[Any] = predicted(cells["peak_bytes_source"])
    only = values.where(source)
    if figure_of == "peak_bytes_median":
        only = only.fillna(cells["peak_bytes_predicted"].where(values.isna()))
    return cells.assign(measured=values.where(~source), only_predicted=only)
