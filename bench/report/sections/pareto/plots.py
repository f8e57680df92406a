"""Quality against cost: a dot a trained model, a step line through those that no other dominates."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import split
from bench.report.data.intervals import Floats
from bench.report.data.kinds import KEEP
from bench.report.figures import canvas
from bench.report.figures.baselines import baseline_handles, draw_baselines
from bench.report.figures.lines import (
    GREY,
    Look,
    disturbed_note,
    interval_of,
    label_handles,
    replicates,
)
from bench.report.sections.pareto.data import COSTS, FRONT, SCORES
from bench.report.text import units
from bench.report.text.marks import LEAK

MOST_TICKS = 5
"""More figures with their units do not fit below a panel."""
AXES = {
    "time": ("time of a step", units.seconds),
    "memory": ("peak memory", units.size),
    "flops": ("executed FLOPs of a step", units.flops),
}


def pareto(cells: pd.DataFrame, look: Look) -> Figure | None:
    """Of one depth: a row of panels a length and training, a panel a cost; takes `pareto.pareto_cells`.

    None if no cost was measured.
    """
    costs = [name for name in COSTS if len(cells) and cells[name].notna().any()]
    if not costs:
        return None
    parts = list(split(cells, ["seq_len", "tokens_trained", "score"]))
    figure, axes = canvas.panels(
        len(costs) * len(parts), columns=len(costs), width=3.2, height=2.9, sharey=len(parts) == 1
    )
    for number, axis in enumerate(axes):
        (values, part), cost = parts[number // len(costs)], costs[number % len(costs)]
        _models(axis, part, cost, look)
        _scale(axis, part, cost)
        words = f"length {units.length(values['seq_len'])}"
        axis.set_title(f"{words}, {units.count(values['tokens_trained'])} tokens", fontsize=8)
        axis.set_xlabel(AXES[cost][0])
        if number % len(costs) == 0:
            better = "higher" if values["score"] == "accuracy" else "lower"
            axis.set_ylabel(f"{SCORES[values['score']]} ({better} is better)")
        if values["score"] == "bits_per_byte":
            draw_baselines(axis, part)
    handles: list[Artist] = [*label_handles(cells, look, line="")]
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="front"))
    if cells["leaks"].any():
        hollow = Line2D(
            [], [], color=GREY, marker="o", fillstyle="none", linestyle="", label=f"{LEAK} sees the future"
        )
        handles.append(hollow)
    handles += baseline_handles(axes)
    footer = f"{look.footer} · {interval_of(cells['replicates'])}, {replicates(cells['replicates'])}"
    footer += disturbed_note(cells[cells["time"].notna()], DISTURBED)
    canvas.dress(
        figure, "Quality against cost, trained on equally many tokens", look.setting, footer, handles
    )
    return figure


def _models(axis: Axes, part: pd.DataFrame, cost: str, look: Look) -> None:
    shown = part[part[cost].notna()]
    shown = shown.assign(hollow=shown["leaks"] | (shown[DISTURBED] & (cost == "time")))
    for (label, _), models in shown.groupby(["label", "hollow"], sort=False):
        style = look.styles[str(label)]
        axis.errorbar(
            models[cost],
            models["quality"],
            xerr=_reach(models, cost),
            yerr=_reach(models, "quality"),
            color=style.colour,
            marker=style.marker,
            fillstyle="none" if bool(models["hollow"].iloc[0]) else style.fill,
            markerfacecoloralt="white",
            linestyle="",
            elinewidth=1,
        )
    names = shown["activations"].where(shown["activations"] != KEEP, "") + np.where(shown["leaks"], LEAK, "")
    for x, y, name in zip(shown[cost], shown["quality"], names, strict=True):
        axis.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=6, color=GREY)
    front = part[part[f"{cost}_front"] == FRONT].sort_values(cost)
    # steps, because there is no model between two neighbours on a front
    axis.step(front[cost], front["quality"], where="post", color=GREY, linewidth=1, zorder=1)


def _reach(models: pd.DataFrame, name: str) -> Floats:
    """(2, models): the distance of each interval's ends from its figure; 0 if there is no interval."""
    low, middle, high = (models[f"{name}{end}"].to_numpy(dtype=float) for end in ("_low", "", "_high"))
    return np.nan_to_num(np.maximum([middle - low, high - middle], 0.0))


def _scale(axis: Axes, part: pd.DataFrame, cost: str) -> None:
    """A logarithmic axis of the cost, with round numbers of its unit."""
    logs = np.log2(part[[cost, f"{cost}_low", f"{cost}_high"]].to_numpy(dtype=float))
    low, high = float(np.nanmin(logs)), float(np.nanmax(logs))
    margin = max(0.1 * (high - low), 0.1)
    low, high = 2.0 ** (low - margin), 2.0 ** (high + margin)
    axis.set_xscale("log", base=2)
    axis.set_xlim(low, high)
    show = AXES[cost][1]
    canvas.human_axis(
        axis.xaxis, low, high, lambda value: show(value, short=True), binary=cost == "memory", most=MOST_TICKS
    )
    axis.tick_params(labelsize=7)
