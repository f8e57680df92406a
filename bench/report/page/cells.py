"""The page's table: one row a cell, every figure in the words that summary.md has, and what sorts it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from bench.report import interval_cells, tables, units
from bench.report.groups import CELL
from bench.report.page.figures import Json, numbers

Row: TypeAlias = "pd.Series[Any]"


@dataclass(frozen=True)
class Shown:
    """A column: its title, how a row's figure reads, the figure that sorts it, and what it is."""

    title: str
    text: Callable[[Row], str]
    sort: str
    about: str
    words: bool = False
    """Sorted as words, not as a figure."""


def _replicates(row: Row) -> str:
    return f"{row['replicates']:.0f}"


def _ratio(row: Row) -> str:
    return units.ratio(row["step_seconds_ratio"]) + interval_cells.against(row)


def _perplexity(row: Row) -> str:
    return tables.plus_minus(row["perplexity_mean"], row["perplexity_std"])


def _accuracy(row: Row) -> str:
    return units.share(row["accuracy_mean"], row["accuracy_std"])


def _plain(column: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: show(row[column])


COLUMNS = (
    Shown("variant", lambda row: name(row), "label", "what stands in the attention slot", words=True),
    Shown("length", _plain("seq_len", str), "seq_len", "tokens in a sequence"),
    Shown("depth", _plain("depth", str), "depth", "layers"),
    Shown("activations", _plain("activations", str), "activations", "how they are kept", words=True),
    Shown(
        "step time",
        lambda row: interval_cells.timed(row, "step_seconds_median", units.seconds),
        "step_seconds_median",
        "median over replicates of a forward and backward over batch × length tokens",
    ),
    Shown(
        "95 % interval",
        lambda row: interval_cells.interval([row], "step_seconds", "seconds")[0],
        "step_seconds_low",
        "of the step time, over replicates",
    ),
    Shown("time / dense", _ratio, "step_seconds_ratio", "median of the ratios within a replicate"),
    Shown(
        "throughput",
        _plain("tokens_per_second_median", units.rate),
        "tokens_per_second_median",
        "tokens trained on in a second",
    ),
    Shown("peak memory", lambda row: tables.peak(row), "peak_shown", "the most that is live in a step"),
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
    Shown("perplexity", _perplexity, "perplexity_mean", "mean ± standard deviation over replicates"),
    Shown(
        "bits per byte", _plain("bits_per_byte_mean", units.score), "bits_per_byte_mean", "lower is better"
    ),
    Shown("accuracy", _accuracy, "accuracy_mean", "the share of answers that are right"),
    Shown("replicates", _replicates, "replicates", "how many finished"),
    Shown("status", _plain("status", str), "status", "how it ended", words=True),
)


def name(row: Row) -> str:
    """A variant's label, marked where it sees the future."""
    return str(row["label"]) + (tables.LEAK if row["leaks"] else "")


def rows(cost: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """The cost cells, each with the quality of its best training, and `peak_shown`: measured, else predicted.

    Of several trainings that with the most tokens counts, scored on the split *test* where there is one;
    of its learning rates that of the least mean loss. `trained` says which in words; `score` is
    the accuracy, else the perplexity.
    """
    cells = cost.assign(peak_shown=cost["peak_bytes_median"].fillna(cost["peak_bytes_predicted"]))
    quality = quality.drop(columns="leaks", errors="ignore")
    order = quality.assign(other=quality["eval_split"] != "test", fewer=-quality["tokens_trained"])
    order = order.sort_values(["other", "fewer", "nll_mean", "learning_rate"], kind="stable")
    best = order.drop_duplicates(list(CELL)).drop(columns=["other", "fewer"])
    words = [tables.trained(row) for _, row in best.iterrows()]
    best = best.assign(trained=pd.Series(words, index=best.index, dtype="str"))
    cells = cells.merge(best, on=list(CELL), how="left", validate="one_to_one")
    score = cells["accuracy_mean"].fillna(cells["perplexity_mean"])
    return cells.assign(trained=cells["trained"].fillna(""), score=score)


def score(row: Row) -> str:
    """What ranks the quality of a cell, in words: its accuracy where it has one, else its perplexity."""
    return _perplexity(row) if units.missing(row["accuracy_mean"]) else _accuracy(row)


def table(cells: pd.DataFrame) -> list[Json]:
    """The columns for JSON: title, what it is, a text a cell, and what a cell is sorted by.

    Columns in which no cell has anything are left out, and `activations` where all have the same.
    """
    every = [row for _, row in cells.iterrows()]
    found = []
    for column in COLUMNS:
        text = [column.text(row) for row in every]
        if all(t == units.MISSING for t in text) or (column.title == "activations" and len(set(text)) < 2):
            continue
        sort = list(cells[column.sort]) if column.words else numbers(cells[column.sort])
        found.append({"title": column.title, "about": column.about, "text": text, "sort": sort})
    return found
