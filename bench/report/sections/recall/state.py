"""Accuracy against the bytes of state that are carried to the next token, as a figure and as a table.

Where the records sweep knobs that set the size of a variant's state, a variant is a line, as in figures of
Arora 2023 (Zoology, arXiv:2312.04927) and of Arora 2024 (Based, arXiv:2402.18668). Dense attention, which
keeps every key and value, is the limit.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report.data.groups import natural, varying
from bench.report.data.statistics import BASELINE
from bench.report.figures import canvas
from bench.report.figures.families import panel_keys
from bench.report.figures.lines import Look, line_of
from bench.report.figures.style import Style, styles
from bench.report.sections.recall.data import trained_apart
from bench.report.sections.recall.plots import draw_guessing, recall_figure
from bench.report.text import units
from bench.report.text.cells import label_of
from bench.report.text.columns import Column, each

ENOUGH = 0.9
"""Share of dense attention's accuracy for which the table states the state that is needed."""


OF_HEADS = ("heads", "head_size", "kv_heads")
"""Options of the model that set the size of a state, as the knobs of a variant do: cells that differ in them
are points of one line."""


def swept(cells: pd.DataFrame) -> pd.Series[bool]:
    """Whether each cell is of a variant that was measured with states of several sizes."""
    return cells.groupby("variant")["sequence_state_bytes"].transform("nunique") > 1


def by_state(cells: pd.DataFrame, look: Look) -> Figure | None:
    """A line a variant over the bytes that it carries; None where fewer than two amounts are known.

    The line connects the best cells of each size. Where no variant has several sizes, labels are markers.
    """
    cells = cells[cells["sequence_state_bytes"].notna()]
    if cells["sequence_state_bytes"].nunique() < 2:
        return None
    keys = panel_keys(cells, "knobs", trained=trained_apart(cells))
    several = _several(cells, keys)
    if several:
        pairs = {(str(name), str(name)) for name in cells["variant"]}
        cells, look = cells.assign(label=cells["variant"]), Look(styles(pairs), look.setting, look.footer)
    smallest = cells.loc[cells["sequence_state_bytes"] > 0, "sequence_state_bytes"].min()
    low, high = smallest / 1.4, cells["sequence_state_bytes"].max() * 1.4
    nothing = (cells["sequence_state_bytes"] == 0).any()  # as of chunks, where one has just ended

    def draw(axis: Axes, part: pd.DataFrame) -> None:
        for label, own in part.groupby("label"):
            _points(axis, own, look.styles[str(label)])
        if several:
            for accuracy in part.loc[part["variant"] == BASELINE, "accuracy_mean"]:
                axis.axhline(accuracy, color=look.styles[BASELINE].colour, linestyle=":", linewidth=1)
        draw_guessing(axis, part)
        if nothing:  # 0 has a place of its own, left of the least that is more
            axis.set_xscale("symlog", base=2, linthresh=smallest / 2, linscale=0.5)
        else:
            axis.set_xscale("log", base=2)
        axis.set_xlim(-smallest / 8 if nothing else low, high)
        canvas.human_axis(
            axis.xaxis, low, high, lambda v: units.size(v, short=True), binary=True, zero=bool(nothing)
        )

    handles: list[Artist] = []
    if several and (cells["variant"] == BASELINE).any():
        colour = look.styles[BASELINE].colour
        handles.append(
            Line2D([], [], color=colour, linestyle=":", linewidth=1, label=f"{BASELINE}, the limit")
        )
    title, line = "Accuracy against the state that is carried", "-" if several else ""
    return recall_figure(cells, look, keys, draw, title, "state of all layers", line=line, handles=handles)


def _several(cells: pd.DataFrame, keys: list[str]) -> bool:
    """Whether some panel has a variant with states of several sizes."""
    return bool((cells.groupby([*keys, "variant"], dropna=False)["sequence_state_bytes"].nunique() > 1).any())


def _points(axis: Axes, own: pd.DataFrame, style: Style) -> None:
    """A marker and its range at each cell, and a line through the best of each size."""
    for _, cell in own.iterrows():
        mean, state = float(cell["accuracy_mean"]), cell["sequence_state_bytes"]
        axis.vlines(state, cell["accuracy_min"], cell["accuracy_max"], color=style.colour, linewidth=1.2)
        marker = line_of(style, hollow=bool(cell["leaks"]))
        marker.set_data([state], [mean])
        axis.add_line(marker)
    best = own.groupby("sequence_state_bytes")["accuracy_mean"].max()
    if len(best) > 1:
        axis.plot(best.index, best, color=style.colour, linewidth=1.4)


def state_needed(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a variant that was measured with several sizes of state and a setting of the task beside dense.

    Columns: `variant`, the keys of a panel, `low` and `high` (bytes, the range that was measured), `needed`
    (bytes: the least with `ENOUGH` of the accuracy of dense; NaN if none has), `label` of the cell with it,
    `share` of the state of dense, and of the most accurate cell `best`, `best_bytes` and `best_label`.
    """
    keys = ["knobs", "depth", "seq_len", *trained_apart(cells)]
    rows: list[dict[str, Any]] = []
    for values, part in cells[cells["sequence_state_bytes"].notna()].groupby(keys, sort=False, dropna=False):
        dense = part[part["variant"] == BASELINE]
        if dense.empty:
            continue
        limit = dense.sort_values("accuracy_mean").iloc[-1]
        for variant, own in part[swept(part)].groupby("variant", sort=True):
            own = own.sort_values("sequence_state_bytes")
            good = own[own["accuracy_mean"] >= ENOUGH * limit["accuracy_mean"]]
            best = own.iloc[int(own["accuracy_mean"].argmax())]
            row: dict[str, Any] = dict(zip(keys, values, strict=True))
            row |= {
                "variant": variant,
                "low": own["sequence_state_bytes"].min(),
                "high": own["sequence_state_bytes"].max(),
            }
            row |= {
                "needed": good["sequence_state_bytes"].min(),
                "label": _named(good.iloc[0], own) if len(good) else None,
            }
            row |= {"share": row["needed"] / limit["sequence_state_bytes"], "best": best["accuracy_mean"]}
            row |= {
                "best_bytes": best["sequence_state_bytes"],
                "best_label": _named(best, own),
                "dense": limit["accuracy_mean"],
            }
            rows.append(row)
    found = pd.DataFrame(rows)
    if found.empty:
        return found
    order = sorted(range(len(found)), key=lambda i: (natural(found["knobs"][i]), natural(found["needed"][i])))
    return found.iloc[order].reset_index(drop=True)


def _named(cell: pd.Series[Any], among: pd.DataFrame) -> str:
    """The label of a cell, with its options of heads that differ among the cells of its variant."""
    options = [f"{key}={cell[key]}" for key in varying(among, OF_HEADS)]
    return ", ".join([label_of(cell), *options])


def needed_table(needed: pd.DataFrame) -> list[Column]:
    """The rows of `state_needed`, the least state first."""
    several = [key for key in ("knobs", "depth", "seq_len") if needed[key].nunique() > 1]
    return [
        each(needed, "variant", "variant", str, right=False, optional=False),
        *(each(needed, key, key, str, right=False) for key in several),
        Column(
            "states measured",
            [
                units.between(low, high, "size")
                for low, high in zip(needed["low"], needed["high"], strict=True)
            ],
        ),
        each(needed, "state needed", "needed", units.size, optional=False),
        each(needed, "/ dense", "share", units.percent),
        each(
            needed,
            "as",
            "label",
            lambda label: label if isinstance(label, str) else units.MISSING,
            right=False,
        ),
        each(needed, "best accuracy", "best", units.share),
        each(needed, "at", "best_bytes", units.size),
        each(needed, "of", "best_label", str, right=False),
        each(needed, "dense", "dense", units.share),
    ]
