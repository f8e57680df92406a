"""The tables of summary.md, each from the aggregated cells, and the files summary.csv and cells.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from bench.report.data.compared_time import DEVICE, SECONDS, SOURCE, WALL
from bench.report.text import markdown, units
from bench.report.text.columns import Column, each
from bench.report.text.marks import LAUNCH_BOUND, LEAK, MATH, NO_BASELINE, PREDICTED, UNDERTRAINED, timed


def label_of(row: pd.Series[Any]) -> str:
    """A variant's label, marked where it sees the future, or is trained and undertrained or without a
    baseline."""
    return str(row["label"]) + (LEAK if row["leaks"] else "") + undertrained(row)


def undertrained(row: pd.Series[Any]) -> str:
    """The mark of a row that was trained and is undertrained, or has no baseline; else nothing."""
    found = {
        mark: row.get(key) for mark, key in ((UNDERTRAINED, "undertrained"), (NO_BASELINE, "no_baseline"))
    }
    return "".join(mark for mark, value in found.items() if not pd.isna(value) and bool(value))


def peak(row: pd.Series[Any]) -> str:
    """Measured peak memory, else the prediction with its mark."""
    measured = not pd.isna(row["peak_bytes_median"])
    value = row["peak_bytes_median"] if measured else row["peak_bytes_predicted"]
    predicted = not measured or "predicted" in str(row["peak_bytes_source"])
    return units.size(value) + (PREDICTED if predicted and not pd.isna(value) else "")


def time_title(cells: pd.DataFrame) -> str:
    """The title of the column of compared times of cells that share a machine."""
    return "device time" if (cells[SOURCE] == DEVICE).any() else "step time"


def compared(row: pd.Series[Any]) -> str:
    """The compared time of a step, marked where it is contaminated, is of the backend math, or is a wall time
    that is the host's."""
    text = timed(row, f"{SECONDS}_median", units.seconds)
    return _bound(text, row, WALL) + (MATH if row["unasked_math"] and text != units.MISSING else "")


def wall(row: pd.Series[Any]) -> str:
    """The wall time of a step where another time is compared, with the same marks."""
    if row[SOURCE] != DEVICE:
        return units.MISSING
    return _bound(timed(row, "step_seconds_median", units.seconds), row, DEVICE)


def _bound(text: str, row: pd.Series[Any], source: str) -> str:
    bound = row["launch_bound"] and row[SOURCE] == source and text != units.MISSING
    return text + (LAUNCH_BOUND if bound else "")


def plus_minus(mean: Any, std: Any) -> str:
    """Mean ± deviation; only the mean if there is a single replicate."""
    if pd.isna(mean) or pd.isna(std):
        return units.score(mean)
    places = len(units.score(mean).partition(".")[2])
    return f"{units.score(mean)} ± {std:,.{places}f}"


def training_columns(cells: pd.DataFrame, varying_keys: Sequence[str]) -> list[Column]:
    """Columns for those keys of `TRAINING`."""
    columns = []
    if {"train_budget", "train_amount"} & set(varying_keys):
        pairs = zip(cells["train_budget"], cells["train_amount"], strict=True)
        columns.append(Column("budget", [units.budget(kind, amount) for kind, amount in pairs]))
    if "schedule" in varying_keys:
        columns.append(each(cells, "schedule", "schedule", or_dash, right=False))
    if "train_state" in varying_keys:
        columns.append(each(cells, "state in training", "train_state", or_dash, right=False))
    if "learning_rate" in varying_keys:
        columns.append(each(cells, "learning rate", "learning_rate", units.learning_rate))
    if "search_budget" in varying_keys:
        columns.append(each(cells, "rate searched with", "search_budget", or_dash, right=False))
    if "eval_split" in varying_keys:
        columns.append(each(cells, "split", "eval_split", or_dash, right=False))
    return columns


def or_dash(value: object) -> str:
    text = "" if value is None or value != value else str(value)
    return markdown.shortened(text) or units.MISSING
