"""Cells of other sections as points of mixtures: a value, its ends, its ratio to dense and its doubt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import BUDGET, CELL, TRAINING
from bench.report.data.intervals import LEVEL, floor_for
from bench.report.data.statistics import BASELINE

BITS, ACCURACY, STATE, STEP, TOKEN, BATCH = "bits", "accuracy", "state", "step", "token", "batch"
FIGURES = (BITS, ACCURACY, STATE, STEP, TOKEN, BATCH)
"""The figures of a mixture, in the order of panels and columns."""
OF_DATA = (BITS, ACCURACY)
"""Those that depend on the data, so that each data set has a panel."""


def points_of(done: Mapping[str, Any]) -> list[pd.DataFrame]:
    """The points of each figure that was measured, with the keys of their cells."""
    sources = (_bits, _accuracy, _state, _step, _token, _batch)
    return [made for source in sources if len(made := source(done))]


def first_of_dense(label: str) -> tuple[bool, str]:
    """Sort key of the labels of dense attention: torch's fused attention, if it is there, then by name."""
    return "impl=sdpa" not in label, label


def _points(figure: str, cells: pd.DataFrame, keys: Sequence[str], values: Mapping[str, Any]) -> pd.DataFrame:
    """The cells that have a value, with `keys` and `values`, which are columns or names of columns."""
    named = {name: cells[of] if isinstance(of, str) else of for name, of in values.items()}
    points = cells[[key for key in dict.fromkeys(keys) if key in cells]].assign(figure=figure, **named)
    for end in ("low", "high"):
        points[end] = points[end].fillna(points["value"]) if end in points else points["value"]
    kept: pd.DataFrame = points[points["value"].notna()]
    return kept


def _bits(done: Mapping[str, Any]) -> pd.DataFrame:
    cells, pairs = done["quality"].cells, done["quality"].ranking.pairs
    cells = cells[
        cells["bits_per_byte_mean"].notna() & cells["accuracy_mean"].isna() & ~cells["is_other_rate"]
    ]
    if cells.empty:
        return pd.DataFrame()
    cells = cells.sort_values("bits_per_byte_mean").drop_duplicates([*BUDGET, "label"])
    mean, deviation = cells["bits_per_byte_mean"], cells["bits_per_byte_std"]
    factor = mean / cells["nll_mean"]
    ends = {end: factor * cells[f"nll_to_dense{end}"] for end in ("", "_low", "_high")}
    values = {
        "value": mean,
        "deviation": deviation,
        "low": mean - deviation,
        "high": mean + deviation,
        **{f"difference{end}": values for end, values in ends.items()},
        "doubt": (ends["_high"] - ends["_low"]) / 2,
        "differs": _certain(cells, pairs),
        "replicates": "quality_replicates",
        **{name: name for name in ("leaks", "undertrained", "no_baseline")},
    }
    return _points(BITS, cells, [*CELL, *BUDGET], values)


def _certain(cells: pd.DataFrame, pairs: pd.DataFrame) -> pd.Series[Any]:
    """Whether each model's loss certainly differs from dense's, by the comparisons of its pool after Holm's
    correction; null where none decides."""
    if pairs.empty:
        return pd.Series(pd.NA, index=cells.index, dtype="boolean")
    dense = {str(label) for label in cells.loc[cells["variant"] == BASELINE, "label"]}
    chosen = min(dense, key=first_of_dense, default="")
    against = pd.concat(
        pairs[pairs[other] == chosen].rename(columns={own: "label"})[[*BUDGET, "label", "p_corrected"]]
        for own, other in (("first", "second"), ("second", "first"))
    )
    against = against.drop_duplicates([*BUDGET, "label"])  # one of several treatments of state
    p = cells[[*BUDGET, "label"]].merge(against, "left", [*BUDGET, "label"])["p_corrected"]
    found = (p < 1 - LEVEL).astype("boolean").mask(p.isna())
    return found.set_axis(cells.index)


def _accuracy(done: Mapping[str, Any]) -> pd.DataFrame:
    cells = done["recall"]
    if cells.empty:
        return pd.DataFrame()
    keys = [*CELL, "knobs", *(key for key in TRAINING if key != "learning_rate")]
    cells = cells[cells["best"]].sort_values("accuracy_mean", ascending=False).drop_duplicates(keys)
    mean, deviation = cells["accuracy_mean"], cells["accuracy_std"]
    values = {
        "value": mean,
        "deviation": deviation,
        "low": (mean - deviation).clip(lower=0),
        "high": (mean + deviation).clip(upper=1),
        "guess": "guess_accuracy",
        "replicates": "replicates",
        "leaks": "leaks",
    }
    return _points(ACCURACY, cells, keys, values)


def _state(done: Mapping[str, Any]) -> pd.DataFrame:
    """The state that decoding allocated; where nothing was decoded, the state that a sequence carries."""
    decoded = _decoded(done, STATE, "decode_state_bytes", "state_ratio")
    if len(decoded):
        return decoded.drop(columns=DISTURBED)
    cells = done["cost"]
    values = {"value": cells["state_bytes"] / cells["batch_size"], "replicates": "replicates"}
    return _points(STATE, cells, CELL, values)


def _step(done: Mapping[str, Any]) -> pd.DataFrame:
    cells = done["cost"]
    median, ratio = f"{SECONDS}_median", f"{SECONDS}_ratio"
    floor = floor_for(cells["rounds"], np.log(cells["noise_floor"]))
    values = {
        "value": median,
        "low": f"{SECONDS}_low",
        "high": f"{SECONDS}_high",
        "ratio": ratio,
        "differs": "differs",
        "doubt": cells[median] / cells[ratio] * np.expm1(floor),
        "replicates": "replicates",
        "leaks": "leaks",
        DISTURBED: DISTURBED,
    }
    return _points(STEP, cells, CELL, values)


def _token(done: Mapping[str, Any]) -> pd.DataFrame:
    return _decoded(done, TOKEN, "decode_seconds_median", "token_ratio")


def _batch(done: Mapping[str, Any]) -> pd.DataFrame:
    return _decoded(done, BATCH, "decode_batch_rate", "batch_ratio")


def _decoded(done: Mapping[str, Any], figure: str, column: str, ratio: str) -> pd.DataFrame:
    cells = done["decoding"].cells
    if cells.empty:
        return pd.DataFrame()
    same = (DISTURBED, "replicates", "decode_batch_size")
    values = {"value": column, "ratio": ratio, **{name: name for name in same}}
    return _points(figure, cells, CELL, values)
