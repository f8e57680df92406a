"""Trained models on longer sequences and with longer memories: differences to the training length."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.groups import CELL, TRAINING
from bench.report.data.intervals import Floats, student
from bench.report.data.kinds import has_list, with_lists
from bench.report.data.statistics import BASELINE, LEAK_LIMIT

KEYS = [*CELL, *TRAINING]
"""Keys of a cell with a trained model."""
GROUP_SHARE = 4
"""A group of targets is the fourth part of the training length; groups are the unit of chance."""
LENGTH, MEMORY = "length", "memory"
TOLERANCE = 0.01
"""Bits per byte that count as equal."""
_SOURCES = {
    LENGTH: ("longer_lengths", "nll_longer", "nll_longer_error"),
    MEMORY: ("longer_memory_positions", "nll_longer_memory", "nll_longer_memory_error"),
}


def longer_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, kind (`LENGTH` or `MEMORY`) and size; a cell without figures has one row of no kind.

    Columns: the keys, `positions` (the scheme), `reason`, `replicates`, `leaks`, `kind`, `size` (tokens of a
    sequence, or positions of memory), `factor` (size relative to that of training), mean and standard
    deviation over replicates of `bits_per_byte`, `extra` (the mean difference to factor 1 on the same
    targets), and `extra_half`: half the width of its 95 % interval.

    The interval contains the chance of the text, over groups of targets, which replicates share, and that of
    the seed, over replicates.
    """
    asked = frame["longer_reason"].notna() | has_list(frame["nll_longer"])
    ok = frame[(frame["status"] == "ok") & asked]
    rows: list[dict[str, Any]] = []
    for values, own in ok.groupby(KEYS, sort=False, dropna=False):
        cell = {
            **dict(zip(KEYS, values, strict=True)),
            "positions": own["positions"].dropna().iloc[0] if own["positions"].notna().any() else None,
            "reason": "; ".join(own["longer_reason"].dropna().unique()) or None,
            "leaks": own["leak_max_abs"].max() > LEAK_LIMIT,
        }
        measured = own[has_list(own["nll_longer"])]
        figures = [row for kind in _SOURCES for row in _figures(measured, kind)]
        rows += [{**cell, **row} for row in figures or [{"replicates": 0}]]
    if not rows:
        return pd.DataFrame()
    columns = ("kind", "size", "factor", "bits_per_byte_mean", "bits_per_byte_std", "extra", "extra_half")
    cells = pd.DataFrame(rows)
    cells = cells.assign(**{name: None for name in columns if name not in cells})
    later = cells["variant"] != BASELINE
    order = ["none", "later", "label", *(key for key in KEYS if key not in ("variant", "label"))]
    cells = cells.assign(none=cells["kind"].isna(), later=later)
    return cells.sort_values(order, ignore_index=True, kind="stable").drop(columns=["none", "later"])


def _figures(own: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    """A row for each size that all records of a cell have."""
    sizes, losses, errors = _SOURCES[kind]
    needed = (losses, sizes, "nll_longer", "bits_per_byte_longer")
    own = with_lists(own, *needed)
    if own.empty:
        return []
    known = min(len(values) for key in (sizes, losses) for values in own[key])
    common = own[sizes].iloc[0][:known]
    if not common[0]:  # null, or a memory of no positions
        return []
    table = np.array([_floats(values)[:known] for values in own[losses]])  # (R, K) nats
    first = np.array([_floats(values)[0] for values in own["nll_longer"]])
    bits = np.array([_floats(values)[0] for values in own["bits_per_byte_longer"]])
    factor = (bits / first)[:, None]  # of the targets, which all sizes share
    table *= factor
    unknown = [math.nan] * known
    text = [(_floats(values if isinstance(values, list) else []) + unknown)[:known] for values in own[errors]]
    targets = own["tokens_evaluated_longer"].astype(float)
    groups = float((targets / (own["seq_len"] // GROUP_SHARE).clip(lower=1)).min())
    extra = table - table[:, :1]
    half = _half_width(extra, np.array(text) * factor, groups)
    return [
        {
            "kind": kind,
            "size": size,
            "factor": size / common[0],
            "replicates": len(own),
            "bits_per_byte_mean": table[:, k].mean(),
            "bits_per_byte_std": table[:, k].std(ddof=1) if len(own) > 1 else math.nan,
            "extra": extra[:, k].mean(),
            "extra_half": half[k],
        }
        for k, size in enumerate(common)
        if size is not None
    ]


def _half_width(extra: Floats, text: Floats, groups: float) -> Floats:
    """(K,) half the width of the interval of differences (R, K), given the errors over text (R, K); NaN for a
    single group, and for an unknown number of groups.

    Half the widths of the intervals over groups and over replicates, each by Student's t, are added as
    squares. In simulations with 16 groups and three or five replicates this covers 96 to 98 %; degrees of
    freedom by Welch and Satterthwaite cover 93 to 96 %. Two replicates, for which Student's t is too wide to
    show anything, have their range, extended at both ends by the interval over groups; it covers less.
    """
    if math.isnan(groups):
        return np.full(text.shape[1], math.nan)
    over_text = student(max(1, round(groups) - 1)) * np.sqrt((text**2).mean(axis=0))
    replicates = len(extra)
    if replicates == 1:
        return np.asarray(over_text)
    if replicates == 2:
        return np.asarray(np.ptp(extra, axis=0) / 2 + over_text)
    over_seeds = student(replicates - 1) * extra.std(axis=0, ddof=1) / math.sqrt(replicates)
    return np.asarray(np.hypot(over_text, over_seeds))


def _floats(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]


def verdict(own: pd.DataFrame) -> str | None:
    """What the intervals show of the sizes of one cell and kind, in words; None if an interval is not known.

    "worse from 2×": that is the first factor with a difference above `TOLERANCE`. "not decided from 2×": that
    is the first one that may have such a difference. "better": the loss at the largest size is lower by more
    than `TOLERANCE`. "no worse" otherwise.
    """
    longer = own[own["factor"] > 1].sort_values("factor")
    if longer.empty or longer[["extra", "extra_half"]].isna().any(axis=None):
        return None
    factors, extra, half = (longer[name].to_numpy() for name in ("factor", "extra", "extra_half"))
    for words, where in (("worse", extra - half > TOLERANCE), ("not decided", extra + half > TOLERANCE)):
        if where.any():
            return f"{words} from {factors[where.argmax()]:g}×"
    return "better" if extra[-1] + half[-1] < -TOLERANCE else "no worse"
