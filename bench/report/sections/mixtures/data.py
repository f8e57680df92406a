"""Mixtures by the share of their layers that are dense, with the figures that other sections computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.collect import in_layers
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import BUDGET, CELL, TRAINING, natural, split
from bench.report.data.layers import name_of
from bench.report.data.statistics import BASELINE
from bench.report.sections.mixtures.sources import FIGURES, OF_DATA, first_of_dense, points_of
from variants.facts import layers_knob

PAGE = ("machine", "depth")
"""Keys of which each value is a figure and a table."""
_PLACE = tuple(dict.fromkeys((*CELL, *BUDGET, "knobs", *TRAINING)))
"""Keys of cells, of which a figure's source has some."""
_COLUMNS = (
    *("leaks", "undertrained", "no_baseline", "guess", DISTURBED, "replicates", "deviation", "ratio"),
    *("difference", "difference_low", "difference_high", "differs", "doubt", "decode_batch_size"),
)
"""Columns that only some sources have."""


def mixture_points(frame: pd.DataFrame, done: Mapping[str, Any]) -> pd.DataFrame:
    """One row a figure of `FIGURES`, setting and model: of dense, and of kinds with two shares in a setting.

    A *kind* are the variants, with their knobs, of the layers that are not dense; dense has the kind "". A
    mixture of one variant alone has share 0. `frame` has the experiment's records. Empty where no kind has
    two shares below 1 in one setting.

    Columns: `figure`, `pool` (the number of the setting), the keys of cells, `kind`, `member` (the name of
    its first variant), `layers` (one period), `share`, `value` with `low` and `high` (± the standard
    deviation over replicates for `OF_DATA`, the interval over replicates for step times), `ratio` to dense,
    `differs` (from dense; null is undecided), `doubt` (what a difference to dense must exceed, in the unit
    of the value), of bits the `difference` to dense with its interval, `guess` (accuracy of guessing), and
    flags of the source.
    """
    parts = points_of(done)
    layers = _layers(frame)
    if not parts or not layers:
        return pd.DataFrame()
    points = pd.concat(parts, ignore_index=True)
    points = _described(points[points["label"].isin(layers.keys())], layers)
    keys = [*dict.fromkeys(("figure", *_PLACE))]
    keys = [key for key in keys if key in points and key not in ("variant", "label", "learning_rate")]
    points["pool"] = points.groupby(keys, sort=False, dropna=False).ngroup()
    points = points[points["pool"].isin(_swept_pools(points))].reset_index(drop=True)
    return points if points.empty else _with_ratios(points)


def _layers(frame: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """Label → the layers of one period, of dense and of mixtures."""
    own = frame.drop_duplicates("label")
    knobs = {variant: layers_knob(variant) for variant in own["variant"].unique()}
    found: dict[str, tuple[str, ...]] = {}
    for variant, label, text in zip(own["variant"], own["label"], own["params_json"], strict=True):
        layers = [BASELINE] if variant == BASELINE else json.loads(text).get(knobs[variant])
        if isinstance(layers, list) and layers:
            period = tuple(map(str, layers))
            found[str(label)] = period if len({*period}) > 1 else period[:1]
    return found


def holds(flag: Any) -> bool:
    """Whether a flag is set; a null is not."""
    return not pd.isna(flag) and bool(flag)


def _described(points: pd.DataFrame, layers: Mapping[str, tuple[str, ...]]) -> pd.DataFrame:
    """Add `share`, `kind`, `member` and `layers`; one row of each model in each setting."""
    rows = []
    for label, depth in zip(points["label"], points["depth"], strict=True):
        period = layers[label]
        repeats, rest = divmod(int(depth), len(period))
        times = [repeats + (place < rest) for place in range(len(period))]
        dense = sum(n for n, layer in zip(times, period, strict=True) if name_of(layer) == BASELINE)
        used = {layer for n, layer in zip(times, period, strict=True) if n}
        others = sorted((layer for layer in used if name_of(layer) != BASELINE), key=natural)
        kind = in_layers(others)
        member = name_of(others[0]) if others else BASELINE
        rows.append((dense / max(1, int(depth)), kind, member, in_layers(period)))
    described = pd.DataFrame(rows, columns=["share", "kind", "member", "layers"], index=points.index)
    # A mixture of dense layers alone is dense attention once more.
    kept = (described["kind"] != "") | (points["variant"] == BASELINE)
    return pd.concat([points, described], axis=1)[kept]


def _swept_pools(points: pd.DataFrame) -> pd.Series[int]:
    """The settings in which a kind has several shares below 1."""
    mixed = points[points["kind"] != ""]
    shares = mixed.groupby(["pool", "kind"])["share"].nunique()
    return shares[shares > 1].index.get_level_values("pool").to_series()


def full_cell(pool: pd.DataFrame) -> pd.Series[Any] | None:
    """The dense model of a setting: of several, the first by label, of torch's fused attention if there is
    one."""
    dense = pool[pool["kind"] == ""]
    if dense.empty:
        return None
    order = sorted(range(len(dense)), key=lambda at: first_of_dense(str(dense["label"].iloc[at])))
    return dense.iloc[order[0]]


def _with_ratios(points: pd.DataFrame) -> pd.DataFrame:
    """Fill in `ratio` where the source has none, and complete the columns."""
    for name in _COLUMNS:
        if name not in points:
            points[name] = np.nan
    for _, pool in points.groupby("pool"):
        full = full_cell(pool)
        if full is not None:
            points.loc[pool.index, "ratio"] = pool["ratio"].fillna(pool["value"] / full["value"])
    keys = [
        (FIGURES.index(row["figure"]), row["pool"], natural(row["kind"]), row["share"], row["label"])
        for _, row in points.iterrows()
    ]
    return points.iloc[sorted(range(len(points)), key=keys.__getitem__)].reset_index(drop=True)


def panels(points: pd.DataFrame) -> list[pd.DataFrame]:
    """The settings that are shown of a machine and depth: one a figure, of `OF_DATA` one a data set too.

    Of several it is the one with the most models, then the most training, the longest length and the widest
    model.
    """
    found = []
    for figure in FIGURES:
        own = points[points["figure"] == figure]
        for _, part in split(own, ["corpus"]) if figure in OF_DATA else [({}, own)]:
            if len(part):
                found.append(max((pool for _, pool in part.groupby("pool")), key=_weight))
    return found


def _weight(pool: pd.DataFrame) -> tuple[float, ...]:
    first = pool.iloc[0]
    sizes = (first.get("train_amount"), first["seq_len"], first["d_model"], first["batch_size"])
    return float(len(pool)), *(-1.0 if pd.isna(size) else float(size) for size in sizes)
