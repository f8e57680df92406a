"""Tasks with answers: accuracy by variant and by the task's knobs, compared with guessing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.collect import spoken
from bench.report.data.groups import CELL, SEARCH, TRAINING, natural
from bench.report.data.statistics import BASELINE, LEAK_LIMIT

_KEYS = [*CELL, "data", "knobs", *TRAINING, "state_policy"]


def recall_cells(frame: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, training and state policy with an accuracy; dense first, then by name and length.

    Columns: the keys, `replicates`, `accuracy_mean` and `accuracy_std` (n − 1; NaN for one replicate),
    `accuracy_min`, `accuracy_max`, medians of `guess_accuracy`, `sequence_state_bytes` (the state of one
    sequence of the batch), `reach` and
    `tokens_trained`, `nll_mean`, `leaks`, `data_params`, `distance_edges`, `accuracy_by_distance` (a
    mean over replicates a bucket, a list; None where the task has no distances) and `best`: whether its
    learning rate is the best by `rates.rate_cells`, or the only one.
    """
    ok = frame[(frame["status"] == "ok") & frame["accuracy"].notna()]
    if ok.empty:
        return pd.DataFrame()
    ok = ok.assign(sequence_state_bytes=ok["state_bytes"] / ok["batch_size"])
    groups = ok.groupby(_KEYS, sort=False, dropna=False)
    columns: dict[str, pd.Series[Any]] = {"replicates": groups["replicate"].nunique()}
    for statistic in ("mean", "std", "min", "max"):
        columns[f"accuracy_{statistic}"] = groups["accuracy"].agg(statistic)
    for name in ("guess_accuracy", "sequence_state_bytes", "reach", "tokens_trained"):
        columns[name] = groups[name].median()
    columns["nll_mean"] = groups["nll"].mean()
    columns["leaks"] = groups["leak_max_abs"].max() > LEAK_LIMIT
    for name, pick in (
        ("data_params", _first),
        ("distance_edges", _first),
        ("accuracy_by_distance", _mean_by_bucket),
    ):
        columns[name] = groups[name].agg(pick)
    cells = pd.DataFrame(columns).reset_index()
    cells["best"] = True
    if not rates.empty:
        keys = [*SEARCH, "learning_rate"]
        cells["best"] = (
            cells.drop(columns="best").merge(rates[[*keys, "best"]], "left", keys)["best"].ne(False)
        )
    order = [
        (
            natural(cell["data"]),
            cell["variant"] != BASELINE,
            cell["label"],
            cell["seq_len"],
            natural(cell["knobs"]),
        )
        for _, cell in cells.iterrows()
    ]
    return cells.iloc[sorted(range(len(cells)), key=order.__getitem__)].reset_index(drop=True)


def _first(values: pd.Series[Any]) -> Any:
    return values.iloc[0]


def _mean_by_bucket(values: pd.Series[Any]) -> list[float] | None:
    """The mean of each bucket over the replicates that have it; NaN where none has."""
    lists = [value for value in values if isinstance(value, list)]
    if not lists:
        return None
    return [float(mean) for mean in pd.DataFrame(lists).astype(float).mean()]


def beyond(cells: pd.DataFrame, keys: Sequence[str], by: Sequence[str]) -> list[str]:
    """Those of the keys that differ among cells which agree in `by`: that do not just follow from it."""
    groups = cells.groupby(list(by), dropna=False)
    return [key for key in keys if (groups[key].nunique(dropna=False) > 1).any()]


def trained_apart(cells: pd.DataFrame) -> list[str]:
    """Keys of the training that vary, except those that follow from the task and the search over rates."""
    return beyond(cells, [key for key in TRAINING if key != "learning_rate"], ["knobs", "seq_len"])


def axes_of(cells: pd.DataFrame) -> list[str]:
    """The axes for accuracy: numeric knobs that differ among the cells of one task, and `seq_len` unless it
    follows from them."""
    params = list(cells["data_params"])
    names = sorted({name for values in params for name in values})
    axes = []
    for name in names:
        present = [values[name] for values in params if name in values]
        numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in present)
        if numeric and len(set(present)) > 1:
            axes.append(name)
    return [*axes, *beyond(cells, ["seq_len"], ["knobs"])]


def along(cells: pd.DataFrame, axis: str) -> pd.DataFrame:
    """The cells with `x`, their value of a knob or of `seq_len`, and `rest`, their other differing knobs."""
    params = list(cells["data_params"])
    names = sorted({name for values in params for name in values} - {axis})
    texts = {name: [spoken(values[name]) if name in values else None for values in params] for name in names}
    varying_names = [name for name in names if len(set(texts[name])) > 1]
    rest = [
        ", ".join(f"{name}={texts[name][row]}" for name in varying_names if texts[name][row])
        for row in range(len(params))
    ]
    x = cells["seq_len"] if axis == "seq_len" else [values.get(axis, math.nan) for values in params]
    return cells.assign(x=x, rest=rest).astype({"x": float})


def evenly_spaced(edges: list[int]) -> bool:
    """Whether distances lie evenly, but for rounding to whole tokens; else each is a multiple of the last."""
    return len(edges) < 3 or float(np.ptp(np.diff(edges))) <= 1
