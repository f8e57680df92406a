"""Activation strategies compared: the parts of the peak, the cost of recomputation, errors of predictions.

All figures come from finished cells; those of a plan are predictions and marked as such.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from bench.records import NOT_COMPILED
from bench.report.data.compared_time import SECONDS, SOURCE
from bench.report.data.disturbed import marked, undisturbed_medians, with_ratios
from bench.report.data.groups import CELL
from bench.report.data.kinds import KEEP, predicted
from bench.report.figures.style import ordered

PARTS = {
    "param_bytes": "parameters",
    "optimizer_bytes": "optimiser state",
    "peak_grad_bytes": "gradients",
    "peak_activation_bytes": "saved activations",
    "peak_workspace_bytes": "workspace",
}
"""Parts of the peak: figure of a record → name. They add up to `peak_bytes`."""
FAR = 0.05
"""A prediction further from the measured peak than this share is named."""
_COMPARED = {
    "flops_executed_step": "flops_executed_ratio",
    "step_seconds_median": "step_seconds_ratio",
    SECONDS: f"{SECONDS}_ratio",
    "peak_bytes": "peak_bytes_ratio",
    "activation_bytes": "activation_bytes_ratio",
}


_TIMED = ("step_seconds_median", SECONDS)


def peak_parts(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell whose peak is divided into parts: keys, `PARTS`, `peak_bytes`, `peak_phase`,
    `predicted`.

    Bytes are means over replicates, so that the parts still add up.
    """
    complete = frame[(frame["status"] == "ok") & frame[[*PARTS, "peak_bytes"]].notna().all(axis=1)]
    complete = complete.assign(predicted=predicted(complete["peak_bytes_source"]))
    groups = complete.groupby(list(CELL), sort=False, dropna=False)
    cells = groups[[*PARTS, "peak_bytes"]].mean()
    cells["peak_phase"] = groups["peak_phase"].agg(
        lambda phases: " or ".join(sorted(phases.dropna().unique()))
    )
    cells["predicted"] = groups["predicted"].any()
    return ordered(cells.reset_index())


def shared(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells at the longest length, and at the greatest depth there, that most strategies share."""
    counts = cells.groupby(["seq_len", "depth"])["activations"].nunique().reset_index()
    best = counts.sort_values(["activations", "seq_len", "depth"]).iloc[-1]
    here: pd.Series[bool] = (cells["seq_len"] == best["seq_len"]) & (cells["depth"] == best["depth"])
    return cells[here]


def recomputation(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a finished cell: its cost, and as ratios to the same cell with every activation kept.

    Columns: the keys; medians of the figures and, as `*_ratio`, the median over replicates of the
    figure over that of `keep` in the same replicate (NaN where keep has none); `disturbed` and
    `ratio_disturbed`, whether times and their ratios are of disturbed measurements, which take part where a
    cell has no others; `rebuild_error` and `recompute_max_abs`, the worst found. Empty where every cell
    saves activations one way.
    """
    ok = frame[frame["status"] == "ok"]
    if ok["activations"].nunique() < 2:
        return pd.DataFrame()
    ok = marked(ok).assign(
        rebuild_error=[_worst(levels) for levels in ok["rebuild_error_by_level"]],
        predicted=predicted(ok["peak_bytes_source"]),
    )
    peers = [key for key in (*CELL, "replicate") if key != "activations"]
    ok = with_ratios(ok, ok[ok["activations"] == KEEP], peers, _COMPARED)
    cells = undisturbed_medians(ok, list(CELL), _COMPARED, timed=_TIMED)
    groups = ok.groupby(list(CELL), sort=False, dropna=False)
    cells["replicates"] = groups["replicate"].nunique()
    cells[SOURCE] = groups[SOURCE].first()
    cells["predicted"] = groups["predicted"].any()
    cells[["rebuild_error", "recompute_max_abs"]] = groups[["rebuild_error", "recompute_max_abs"]].max()
    return ordered(cells.reset_index())


def _worst(levels: object) -> float:
    """The largest error of any level; a level that is null was not finite."""
    if not isinstance(levels, list) or not levels:
        return math.nan
    return max(math.inf if level is None else float(level) for level in levels)


def prediction_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """The records whose peak was measured and predicted; `error` is predicted over measured, minus 1.

    Compiled cells are left out: a prediction is that of the same step without compilation. Memory that
    libraries keep between steps is subtracted from the measured peak: predictions do not include it.
    """
    both = frame[
        (frame["status"] == "ok")
        & (frame["peak_bytes"] > 0)
        & frame["peak_bytes_predicted"].notna()
        & (frame["compile"] == NOT_COMPILED)
    ]
    both = both[~predicted(both["peak_bytes_source"])]
    measured = both["peak_bytes"] - both["library_bytes"].fillna(0)
    both, measured = both[measured > 0], measured[measured > 0]
    return both.assign(error=both["peak_bytes_predicted"] / measured - 1)


def prediction_summary(errors: pd.DataFrame) -> pd.DataFrame:
    """One row for all, then one a device, variant and strategy: `cells`, `median`, `p95`, `largest`.

    Median and 95th percentile (interpolated) are of the error without its sign; the largest keeps it.
    """
    rows = [{"device": "", "variant": "", "label": "", "activations": "", **_spread(errors["error"])}]
    groups = errors.groupby(["device", "variant", "label", "activations"], sort=False)
    parts = []
    for keys, part in groups["error"]:
        named = dict(zip(("device", "variant", "label", "activations"), keys, strict=True))
        parts.append({**named, **_spread(part)})
    each = pd.DataFrame(parts)
    return pd.concat([pd.DataFrame(rows), ordered(each.sort_values("device"))], ignore_index=True)


def _spread(errors: pd.Series[float]) -> dict[str, Any]:
    sizes = errors.abs()
    return {
        "cells": len(errors),
        "median": sizes.median(),
        "p95": sizes.quantile(0.95),
        "largest": errors.iloc[int(sizes.argmax())],
    }
