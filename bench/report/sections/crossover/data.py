"""From which length on a variant is cheaper than dense attention: in time, in memory, in FLOPs.

Ratios to dense are taken within a replicate, whose cells ran one after the other. Between two measured
lengths the logarithm of a ratio is taken to be a line in the logarithm of the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.baselines import LEAST, undertrained, with_baselines
from bench.report.data.crossing import FIGURES, bracket, crossing, ratio_error
from bench.report.data.disturbed import DISTURBED, RATIO_DISTURBED
from bench.report.data.groups import GROUP, SLOT_COLUMNS, TRAINING, split
from bench.report.data.intervals import interval
from bench.report.data.statistics import BASELINE, LEAK_LIMIT, at_best_rate


def compared(cells: pd.DataFrame) -> pd.DataFrame:
    """The cost cells that have a dense cell to compare with, without the dense cells."""
    others = cells[cells["baseline"].notna() & (cells["label"] != cells["baseline"])]
    return others[others[list(FIGURES.values())].notna().any(axis=1)]


def crossovers(cells: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """One row a variant, group and comparison of two lengths or more; takes `statistics.cost_cells` and
    `quality_loss`.

    Columns: the keys of `groups.GROUP`, `variant`, `label`, `figure` (of `FIGURES`), `outcome` and `length`
    as `crossing` has them, of times also `low` and `high` (the `bracket`: 0 if it contains all measured
    lengths, infinite if it contains none), `disturbed` (whether a ratio rests on disturbed measurements),
    `first` and `last` length measured, `lengths` (how many), and the quality lost at the nearest length where
    there is any: `nll_lost`, `nll_lost_low`, `nll_lost_high`, `quality_seq_len`, `quality_width`,
    `quality_depth`.
    """
    others = compared(cells)
    by_model = dict(iter(quality.groupby(list(_MODEL), dropna=False)))
    rows = []
    for values, own in split(others, [*GROUP, "variant", "label"]) if len(others) else ():
        for figure, column in FIGURES.items():
            known = own[own[column].notna()].sort_values("seq_len")
            if len(known) < 2:
                continue
            lengths = known["seq_len"].to_numpy(dtype=float)
            outcome, place = crossing(list(lengths), list(known[column]))
            low = high = np.nan
            is_time = figure == "time"
            if is_time:
                low, high = bracket(list(lengths), list(known[column]), *ratio_error(known))
            rows.append(
                {
                    **values,
                    "figure": figure,
                    "outcome": outcome,
                    "length": place,
                    "low": low,
                    "high": high,
                    DISTURBED: is_time and bool(known[RATIO_DISTURBED].any()),
                    "first": lengths[0],
                    "last": lengths[-1],
                    "lengths": len(lengths),
                    **_nearest(by_model, values, place),
                }
            )
    return pd.DataFrame(rows)


_LOSS = ("nll_lost", "nll_lost_low", "nll_lost_high", "quality_seq_len", "quality_width", "quality_depth")
_MODEL = ("objective", "corpus", *SLOT_COLUMNS.values(), "label")
_RUN = (
    "objective",
    "corpus",
    "d_model",
    "heads",
    *SLOT_COLUMNS.values(),
    "depth",
    "activations",
    "compile",
    "seq_len",
    "replicate",
)
"""Keys that must be equal for a trained model and its dense reference, in addition to the training."""


def quality_loss(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a variant and trained model: mean loss over replicates minus that of dense in the same
    replicate.

    Columns: the keys `_MODEL`, and `_LOSS`: nats a token with their interval over replicates,
    and the length, width and depth of the trained model. Where several learning rates were tried, each model
    is at its own best. Models that leak or are undertrained are left out: their loss is not comparable.
    """
    ok = frame[(frame["status"] == "ok") & frame["nll"].notna() & ~(frame["leak_max_abs"] > LEAK_LIMIT)]
    if ok.empty or not (ok["variant"] == BASELINE).any():
        return pd.DataFrame(columns=[*_MODEL, *_LOSS])
    shared = [*_RUN, *(key for key in TRAINING if key != "learning_rate")]
    run = [*shared, "variant", "label"]
    model = [key for key in run if key != "replicate"]
    best = with_baselines(at_best_rate(ok, model))
    means = best.groupby(model, dropna=False)[["bits_per_byte", LEAST]].transform("mean")
    best = best[~undertrained(means.rename(columns={"bits_per_byte": "bits_per_byte_mean"}))]
    nll = best.groupby(run, dropna=False)["nll"].mean().reset_index()
    dense = nll[nll["variant"] == BASELINE].groupby(shared, dropna=False)["nll"].min().rename("dense")
    pairs = nll[nll["variant"] != BASELINE].merge(dense.reset_index(), on=shared)
    pairs["lost"] = pairs["nll"] - pairs["dense"]
    rows = []
    keys = [key for key in shared if key != "replicate"]
    for values, own in split(pairs, [*keys, "label"]):
        low, high = interval(own["lost"].to_numpy(dtype=float))
        figures = (
            own["lost"].mean(),
            float(low),
            float(high),
            values["seq_len"],
            values["d_model"],
            values["depth"],
        )
        named = {key: values[key] for key in _MODEL}
        rows.append(named | dict(zip(_LOSS, figures, strict=True)))
    return pd.DataFrame(rows, columns=[*_MODEL, *_LOSS])


def _nearest(quality: Mapping[Any, pd.DataFrame], values: dict[str, Any], length: float) -> dict[str, Any]:
    """The variant's loss, at the same width and depth if it was trained there, at the nearest length; takes
    `quality_loss` by the keys of `_MODEL`."""
    same = quality.get(tuple(values[key] for key in _MODEL))
    if same is None:
        return dict.fromkeys(_LOSS, np.nan)
    far = np.abs(np.log(same["quality_seq_len"].to_numpy(dtype=float) / length))
    other_depth = (same["quality_depth"] != values["depth"]).to_numpy()
    other_width = (same["quality_width"] != values["d_model"]).to_numpy()
    best = same.iloc[np.lexsort((far, other_depth, other_width))[0]]
    return {name: best[name] for name in _LOSS}
