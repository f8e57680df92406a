"""Tables of the cost of activation strategies, and of the errors of predicted peaks."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import RATIO_DISTURBED
from bench.report.data.groups import COMMON, varying
from bench.report.sections.memory.data import FAR, prediction_summary
from bench.report.text import units
from bench.report.text.cells import time_title
from bench.report.text.columns import Column, each
from bench.report.text.marks import PREDICTED, disturbed, timed


def recomputation(cells: pd.DataFrame) -> list[Column]:
    """The strategies of each variant, compared with `keep`: the cells of one setting, depth and length."""
    return [
        each(cells, "variant", "label", str, right=False, optional=False),
        each(cells, "activations", "activations", str, right=False, optional=False),
        each(cells, "executed FLOPs", "flops_executed_step", units.flops),
        each(cells, "/ keep", "flops_executed_ratio", units.ratio),
        Column(
            time_title(cells),
            [timed(row, SECONDS, units.seconds) for _, row in cells.iterrows()],
        ),
        Column(
            "/ keep",
            [disturbed(row, f"{SECONDS}_ratio", units.ratio, RATIO_DISTURBED) for _, row in cells.iterrows()],
        ),
        Column("peak memory", [_bytes(row, "peak_bytes") for _, row in cells.iterrows()]),
        each(cells, "/ keep", "peak_bytes_ratio", units.ratio),
        Column("saved activations", [_bytes(row, "activation_bytes") for _, row in cells.iterrows()]),
        each(cells, "/ keep", "activation_bytes_ratio", units.ratio),
        each(cells, "rebuild error", "rebuild_error", units.scientific),
        each(cells, "gradient error", "recompute_max_abs", units.scientific),
        each(cells, "replicates", "replicates", str, optional=False),
    ]


def _bytes(row: pd.Series[Any], figure: str) -> str:
    mark = PREDICTED if row["predicted"] and not pd.isna(row[figure]) else ""
    return units.size(row[figure]) + mark


def predictions(errors: pd.DataFrame) -> list[Column]:
    """How far the predicted peaks are off: over all cells, then by variant and strategy."""
    if errors.empty:
        return []
    summary = prediction_summary(errors)
    devices = [v or "all" for v in summary["device"]]
    return [
        *([Column("device", devices, right=False)] if errors["device"].nunique() > 1 else []),
        each(summary, "variant", "label", lambda v: v or "all", right=False, optional=False),
        each(summary, "activations", "activations", lambda v: v or "all", right=False),
        each(summary, "cells", "cells", str),
        each(summary, "median error", "median", units.percent),
        each(summary, "95th percentile", "p95", units.percent),
        each(summary, "largest", "largest", units.percent),
    ]


def far_off(errors: pd.DataFrame) -> list[Column]:
    """The cells whose prediction is further off than `FAR`, the worst first."""
    far = errors[errors["error"].abs() > FAR]
    if far.empty:
        return []
    far = far.loc[far["error"].abs().sort_values(ascending=False, kind="stable").index]
    varying_keys = [k for k in varying(errors, [*COMMON, "replicate"]) if k != "variant"]
    return [
        each(far, "variant", "label", str, right=False, optional=False),
        each(far, "activations", "activations", str, right=False, optional=False),
        each(far, "length", "seq_len", str),
        each(far, "depth", "depth", str),
        *(each(far, key, key, str, right=False) for key in varying_keys),
        each(far, "measured", "peak_bytes", units.size),
        each(far, "predicted", "peak_bytes_predicted", units.size),
        each(far, "error", "error", units.percent),
    ]
