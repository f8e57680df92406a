"""Every plot of a report: which there are, one figure a setting, and where they were written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from bench.report import (
    budget_plots,
    canvas,
    cost_plots,
    crossover_plots,
    curve_plots,
    memory_plots,
    pareto_plots,
    quality_plots,
    rate_plots,
    recall_plots,
    roofline_plots,
)
from bench.report.budgets import Kinds
from bench.report.groups import COMMON, FIT, PAYOFF, SETTING, TASK, describe, split, suffix, varying
from bench.report.lines import Look
from bench.report.memory import BASELINE
from bench.report.recall import axes_of
from bench.report.style import styles
from bench.report.summary import Found, dates, machines

MOST_NAME = 160
"""Characters of a plot's file name; file systems allow 255 bytes, with the suffix and a number."""
Wanted = tuple[str, dict[str, Any], pd.DataFrame]
"""A figure to draw: its section, the values of its keys and its cells."""
Draw = Callable[[pd.DataFrame, Look], Figure | None]


@dataclass(frozen=True)
class Plot:
    """One kind of figure: the section it stands in, its data, and the keys that a figure's cells share."""

    section: str
    stem: str
    title: str
    data: pd.DataFrame
    draw: Draw
    keys: Sequence[str]
    records: pd.DataFrame


def _plots(kinds: Kinds, found: Found) -> Iterator[Plot]:
    def plain(
        section: str, stem: str, title: str, data: pd.DataFrame, draw: Draw, keys: Sequence[str]
    ) -> Plot:
        return Plot(section, stem, title, data, draw, keys, kinds.plain)

    for kind in cost_plots.BY_LENGTH:
        yield plain("cost", kind.stem, kind.title, found.cost, kind.draw, SETTING)
    for kind in cost_plots.BY_DEPTH:
        yield plain("depths", kind.stem, kind.title, found.cost, kind.draw, SETTING)
    more = found.findings
    draw: Draw
    for section, title, data, draw, keys in (
        ("utilisation", "Utilisation", more.utilisation, roofline_plots.utilisation, SETTING),
        ("crossover", "Cost over dense's", more.compared, crossover_plots.crossover, SETTING),
        ("pareto", "Quality against cost", more.pareto, pareto_plots.pareto, (*COMMON, "depth")),
    ):
        yield plain(section, section, title, data, draw, keys)
    yield plain(
        "memory", "peak_parts", "What the peak is made of", found.parts, memory_plots.waterfall, COMMON
    )
    for stem, title, draw in (
        ("activations_by_depth", "Saved activations against depth", memory_plots.activations_by_depth),
        ("peak_by_depth", "Peak memory against depth", memory_plots.peak_by_depth),
    ):
        yield plain("memory", stem, title, found.cost, draw, COMMON)
    # The longest sequence does not depend on the length given, nor the largest batch on the batch given.
    given_batch = [key for key in FIT if key != "seq_len"]
    title = "The longest sequence that fits"
    yield Plot("fits", "longest_sequence", title, found.fits, budget_plots.longest, given_batch, kinds.fits)
    title = "The largest batch that fits"
    yield Plot("fits", "largest_batch", title, found.fits, budget_plots.largest, PAYOFF, kinds.fits)
    title = "Throughput at the largest batch that fits"
    yield Plot("payoff", "batch_payoff", title, found.payoff, budget_plots.payoff, PAYOFF, kinds.payoff)
    yield plain("quality", "perplexity", "Perplexity", found.quality, quality_plots.perplexity, SETTING)
    title = "How far back it looks"
    yield plain("quality", "effective_context", title, found.quality, quality_plots.context, SETTING)
    for stem, title, draw in (
        ("nll_by_position", "Loss by position", curve_plots.by_position),
        ("nll_by_history", "Loss by how far back is read", curve_plots.by_history),
    ):
        yield plain("quality", stem, title, kinds.plain, draw, SETTING)
    title = "Quality by learning rate"
    yield plain("rates", "learning_rates", title, found.rates, rate_plots.by_rate, SETTING)
    recall = found.answers
    tasks = {} if recall.empty else {data: axes_of(own) for data, own in recall.groupby("data")}
    for name in sorted({name for axes in tasks.values() for name in axes}):
        of = recall[[name in tasks[data] for data in recall["data"]]]
        title, draw = f"Accuracy against {name}", recall_plots.against(name)
        yield plain("recall", f"accuracy_by_{name}", title, of, draw, TASK)
    for stem, title, draw in (
        ("accuracy_by_state", "Accuracy against the state that is carried", recall_plots.by_state),
        ("accuracy_by_distance", "Accuracy by distance", recall_plots.by_distance),
        ("accuracy_map", "Accuracy by distance, as a map", recall_plots.distance_map),
    ):
        yield plain("recall", stem, title, recall, draw, TASK)
    title = "Training loss"
    yield plain("training", "training_loss", title, found.curves, curve_plots.training_loss, TASK)


def draw_all(
    frame: pd.DataFrame, kinds: Kinds, found: Found, report: Path, most: int | None = None
) -> tuple[dict[str, list[tuple[str, str]]], int]:
    """Write every plot that has data into `report`/plots, as PNG and SVG; of each kind those of the fullest
    `most` settings, all without.

    Returns, by section, each plot's title and its path relative to the report, without suffix; and how many
    were left out.
    Where an experiment saves activations in several ways, cost against length is drawn only for
    settings of several lengths, and stands in the section 'others' unless activations are kept. Where it
    has several data sets or settings of a task, cost and memory at a single length and depth are not drawn
    for each: they hardly differ, and are in the tables.
    """
    looks = styles(zip(frame["variant"], frame["label"], strict=True))
    several = found.cost["activations"].nunique() > 1
    corpora = found.cost["corpus"].nunique() > 1
    drawn: dict[str, list[tuple[str, str]]] = {}
    left = 0
    taken: set[str] = set()
    with canvas.look():
        for plot in _plots(kinds, found):
            if plot.data.empty:
                continue
            apart = varying(plot.records, plot.keys)
            wanted = []
            for values, part in split(plot.data, plot.keys):
                section = plot.section
                if section == "depths" and several and values["activations"] != BASELINE:
                    continue
                if corpora and section in ("cost", "memory", "pareto") and _one_point(part):
                    continue
                if section == "cost" and several:
                    if part["seq_len"].nunique() < 2:
                        continue
                    section = "cost" if values["activations"] == BASELINE else "others"
                wanted.append((section, values, part))
            shown = wanted if most is None else _fullest(wanted, most)
            left += len(wanted) - len(shown)
            for section, values, part in shown:
                same = _same(plot.records, values)
                setting = describe(values, [k for k in plot.keys if k not in ("machine", "threads")])
                figure = plot.draw(part, Look(looks, setting, f"{machines(same)} · {dates(same)}"))
                if figure is None:
                    continue
                name = _free((plot.stem + suffix(values, apart))[:MOST_NAME], taken)
                canvas.save(figure, report / "plots", name)
                words = describe(values, apart)
                title = f"{plot.title} ({words})" if words else plot.title
                drawn.setdefault(section, []).append((title, f"plots/{name}"))
    return drawn, left


def _fullest(wanted: list[Wanted], most: int) -> list[Wanted]:
    """Those of the most rows, kept activations first, in their order."""
    ranked = sorted(wanted, key=lambda one: (one[0] == "others", -len(one[2])))
    shown = {id(one) for one in ranked[:most]}
    return [one for one in wanted if id(one) in shown]


def _one_point(cells: pd.DataFrame) -> bool:
    """Whether all cells have one length and one depth."""
    return len(cells[["seq_len", "depth"]].drop_duplicates()) == 1


def _same(frame: pd.DataFrame, values: dict[str, Any]) -> pd.DataFrame:
    """The records of one setting."""
    return frame[(frame[list(values)] == pd.Series(values)).all(axis=1)]


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where two settings differ only in characters a file name cannot hold."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    taken.add(free)
    return free
