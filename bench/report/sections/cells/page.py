"""The rows for the page's scripts: every figure as text, equal to summary.md, and the values to sort by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import pandas as pd

from bench.report.data.baselines import BASELINES, unranked
from bench.report.data.compared_time import RATE, SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.faster import faster_than
from bench.report.data.groups import COMMON, varying
from bench.report.figures.chart_data import Json, lengths, number, numbers
from bench.report.figures.lines import replicates
from bench.report.figures.style import strategy_rank
from bench.report.sections.cells.data import Cells
from bench.report.text import markdown, units
from bench.report.text.cells import compared, label_of, peak, plus_minus, undertrained, wall
from bench.report.text.marks import PREDICTED, against, interval, timed
from bench.report.text.phrases import describe

Row: TypeAlias = "pd.Series[Any]"


@dataclass(frozen=True)
class Shown:
    """A column: its title, the text of a row's figure, the figure to sort by, and its meaning."""

    title: str
    text: Callable[[Row], str]
    sort: str
    about: str
    words: bool = False
    """Sorted as words, not as a figure."""


def _replicates(row: Row) -> str:
    return f"{row['replicates']:.0f}"


def _ratio(row: Row) -> str:
    return units.ratio(row[f"{SECONDS}_ratio"]) + against(row)


def _bits(row: Row) -> str:
    return plus_minus(row["bits_per_byte_mean"], row["bits_per_byte_std"])


def _perplexity(row: Row) -> str:
    return plus_minus(row["perplexity_mean"], row["perplexity_std"])


def _accuracy(row: Row) -> str:
    return units.share(row["accuracy_mean"], row["accuracy_std"])


def _plain(column: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: show(row[column])


COLUMNS = (
    Shown("variant", label_of, "label", "what stands in the attention slot", words=True),
    Shown("length", _plain("seq_len", str), "seq_len", "tokens in a sequence"),
    Shown("depth", _plain("depth", str), "depth", "layers"),
    Shown("activations", _plain("activations", str), "activations", "how they are kept", words=True),
    Shown(
        "step time",
        compared,
        f"{SECONDS}_median",
        "median over replicates of a forward and backward over batch × length tokens: the time that the "
        "device is busy where there is a wall time too, else wall-clock time",
    ),
    Shown(
        "95 % interval",
        lambda row: interval([row], SECONDS, "seconds")[0],
        f"{SECONDS}_low",
        "of the step time, over replicates",
    ),
    Shown(
        "time / dense",
        _ratio,
        f"{SECONDS}_ratio",
        "median over replicates of the ratios to dense, as it ran before and after in the same replicate",
    ),
    Shown("wall time", wall, "step_seconds_median", "where the step time is the device's"),
    Shown(
        "throughput",
        lambda row: timed(row, f"{RATE}_median", units.rate),
        f"{RATE}_median",
        "tokens trained on in a second of the step time",
    ),
    Shown(
        "forward",
        lambda row: timed(row, "forward_seconds_median", units.seconds),
        "forward_seconds_median",
        "wall-clock time of a forward pass without gradients over the same tokens",
    ),
    Shown("peak memory", peak, "peak_shown", "the most that is live in a step"),
    Shown(
        "memory / dense",
        _plain("peak_bytes_ratio", units.ratio),
        "peak_bytes_ratio",
        "peak memory over that of dense",
    ),
    Shown(
        "executed FLOPs",
        _plain("flops_executed_step", units.flops),
        "flops_executed_step",
        "dispatched in a step, recomputation and padding included",
    ),
    Shown(
        "attention FLOPs",
        _plain("flops_attention_step", units.flops),
        "flops_attention_step",
        "by formula: what is no projection, feed-forward or output layer",
    ),
    Shown("bits per byte", _bits, "bits_per_byte_mean", "mean ± standard deviation over replicates"),
    Shown("perplexity", _perplexity, "perplexity_mean", "per token; mean ± standard deviation"),
    Shown(
        "word perplexity",
        _plain("word_perplexity_mean", units.score),
        "word_perplexity_mean",
        "with the corpus's fixed number of words",
    ),
    Shown("accuracy", _accuracy, "accuracy_mean", "the share of answers that are right"),
    Shown("replicates", _replicates, "replicates", "how many finished"),
    Shown("status", _plain("status", str), "status", "how it ended", words=True),
)


_SCORES: Mapping[str, tuple[str, Callable[[Row], str]]] = MappingProxyType(
    {
        "accuracy_mean": ("accuracy", _accuracy),
        "bits_per_byte_mean": ("bits per byte", _bits),
        "perplexity_mean": ("perplexity", _perplexity),
    }
)
"""Column of a measure of quality → its name and text; the first that a cell has is its measure."""


def score(row: Row) -> tuple[str, str]:
    """The name of a cell's measure of quality, and its figure as text, marked if it is undertrained."""
    for column, (name, text) in _SCORES.items():
        if not units.missing(row[column]):
            return name, text(row) + undertrained(row)
    return "", units.MISSING


def _baselines(row: Row) -> list[Json]:
    """The baselines of a cell's text."""
    return [
        {"name": name, "value": number(row[column]), "text": units.score(row[column])}
        for column, name in BASELINES.items()
        if not units.missing(row[column])
    ]


def _beaten(rows: pd.DataFrame) -> list[list[int]]:
    """For each row the places of the rows that it is certainly better than."""
    places = {number: place for place, number in enumerate(rows["number"]) if not pd.isna(number)}
    return [[places[number] for number in own if number in places] for own in rows["beats"]]


def table(cells: pd.DataFrame) -> list[Json]:
    """The columns for JSON: title, meaning, a text a cell, and the value that a cell is sorted by.

    Columns that are empty for all cells are left out, and `activations` if all cells have the same.
    """
    every = [row for _, row in cells.iterrows()]
    columns = []
    for column in COLUMNS:
        text = [column.text(row) for row in every]
        if all(t == units.MISSING for t in text) or (column.title == "activations" and len(set(text)) < 2):
            continue
        sort = list(cells[column.sort]) if column.words else numbers(cells[column.sort])
        columns.append({"title": column.title, "about": column.about, "text": text, "sort": sort})
    return columns


def document(cells: Cells) -> Json:
    """The part of the page's document that has lists with one entry a cell.

    `settings` are what cells must share to be compared, all but the activation strategy; `setting` is each
    cell's place among them. `score` ranks quality, and `score_name` says what it is: the accuracy where
    `accurate`, else bits per byte, else the perplexity; what is `unranked` takes no part. `beats` are the
    places, among all cells, of those that each is certainly better than (`ranking`), and `faster` of those
    that it is known to be faster than. `baselines` are those of each cell's text. For `table` see there.
    """
    rows, settings, places = cells.rows, cells.settings, cells.places
    varying_keys = varying(rows, COMMON) if len(rows) else []
    peaks = [peak(row) for _, row in rows.iterrows()]
    scores = [score(row) for _, row in rows.iterrows()]
    return {
        "settings": [describe(values, varying_keys) or describe(values, COMMON) for values in settings],
        "tasks": [describe(values, ("objective", "corpus")) for values in settings],
        "setting": [places[key] for key in rows[list(COMMON)].itertuples(index=False, name=None)],
        "label": list(rows["label"]),
        "leaks": [bool(leaks) for leaks in rows["leaks"]],
        "activations": list(rows["activations"]),
        "depth": [int(depth) for depth in rows["depth"]],
        "length": [int(length) for length in rows["seq_len"]],
        "status": list(rows["status"]),
        "reason": ["" if pd.isna(reason) else markdown.shortened(reason) for reason in rows["reason"]],
        "finished": [int(count) for count in rows["finished"]],
        "records": [int(count) for count in rows["records"]],
        "replicate_counts": [int(count) for count in rows["replicates"].fillna(0)],
        "replicates": replicates(rows["replicates"].fillna(0).astype(int)),
        "memory": numbers(rows["peak_shown"]),
        "memory_text": peaks,
        "predicted": [text.endswith(PREDICTED) for text in peaks],
        "seconds": numbers(rows[f"{SECONDS}_median"]),
        "seconds_text": [timed(row, f"{SECONDS}_median", units.seconds) for _, row in rows.iterrows()],
        "disturbed": [bool(value) for value in rows[DISTURBED]],
        "rate_text": [timed(row, f"{RATE}_median", units.rate) for _, row in rows.iterrows()],
        "flops": numbers(rows["flops_executed_step"]),
        "flops_text": [units.flops(value) for value in rows["flops_executed_step"]],
        "score": numbers(rows["score"]),
        "score_name": [name for name, _ in scores],
        "score_text": [text for _, text in scores],
        "unranked": [bool(value) for value in unranked(rows) | rows["rank_low"].isna()],
        "beats": _beaten(rows),
        "faster": faster_than(rows),
        "baselines": [_baselines(row) for _, row in rows.iterrows()],
        "accurate": [bool(accurate) for accurate in rows["accuracy_mean"].notna()],
        "trained": list(rows["trained"]),
        "lengths": dict(lengths(list(rows["seq_len"]))),
        "strategies": sorted(rows["activations"].unique(), key=lambda name: (strategy_rank(name), name)),
        "table": table(rows),
    }
