"""Baselines of text beside the models: n-gram tables and compressors, and the models that do not beat them.

This is the only place that decides which trained models are ranked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from bench.report.data.collect import MOST_PERPLEXITY
from bench.report.data.groups import BUDGET

_ORDERS = {f"ngram_{order}_bits_per_byte": f"{order}-gram table" for order in range(1, 6)}
BASELINES = MappingProxyType(
    {
        **_ORDERS,
        "gzip_bits_per_byte": "gzip -9",
        "xz_bits_per_byte": "xz -9e",
        "zstd_bits_per_byte": "zstd -19",
    }
)
"""Column, in bits per byte → the name of the baseline."""
LEAST = "ngram_3_bits_per_byte"
"""The baseline that a model must beat to be ranked."""


def with_baselines(frame: pd.DataFrame) -> pd.DataFrame:
    """The records with a column for each n-gram table, NaN where the record has none."""
    lists = [values if isinstance(values, list) else [] for values in frame["ngram_bits_per_byte"]]
    columns = {
        name: [own[place] if place < len(own) else np.nan for own in lists]
        for place, name in enumerate(_ORDERS)
    }
    return frame.assign(**{name: np.array(values, dtype=float) for name, values in columns.items()})


def undertrained(cells: pd.DataFrame) -> pd.Series[bool]:
    """Whether each cell of text needs more bits per byte than `LEAST`, the table that learnt from the same
    bytes; False without a baseline."""
    return cells["bits_per_byte_mean"] > cells[LEAST]


def without_baseline(cells: pd.DataFrame) -> pd.Series[bool]:
    """Whether each cell is a causal model of tokens whose bytes are not known (`data=ids` without their
    tokenizer): there are no bits per byte and no baselines, so nothing says whether it is trained."""
    causal = cells["objective"].eq("clm") & cells["perplexity_mean"].notna()
    return causal & cells["bits_per_byte_mean"].isna() & cells["accuracy_mean"].isna()


def unranked(cells: pd.DataFrame) -> pd.Series[bool]:
    """Whether the quality of each cell takes no part in any ranking: it sees the future, is undertrained, or
    has no baseline that would say so, or an ordering that its pool must show does not appear (`ranking`).
    Takes the columns `leaks`, `undertrained`, `no_baseline` and `unsettled`; null is False."""
    return cells[["leaks", "undertrained", "no_baseline", "unsettled"]].eq(True).any(axis=1)


def named_means(cells: pd.DataFrame, columns: Iterable[str] = BASELINES) -> list[tuple[str, float]]:
    """Name and mean over the cells, in bits per byte, of those of the baselines that any cell has."""
    means = ((BASELINES[column], float(cells[column].mean())) for column in columns)
    return [(name, mean) for name, mean in means if not np.isnan(mean)]


def baseline_rows(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each baseline of every pool of comparable cells; takes `statistics.quality_cells`.

    A row has the keys of the pool and, as columns of a cell, `label`, `bits_per_byte_mean`, `perplexity_mean`
    (per token of the models), and for a table `ngram_train_bytes`. Where the cells of a pool were not trained
    on the same bytes, it has their mean, and `least` and `most`.
    """
    rows: list[dict[str, Any]] = []
    for _, pool in cells.groupby(list(BUDGET), sort=False, dropna=False):
        nats_per_bit = float((pool["nll_mean"] / pool["bits_per_byte_mean"]).mean())
        for column, name in BASELINES.items():
            bits = pool[column].dropna()
            if bits.empty:
                continue
            nats = nats_per_bit * bits.mean()
            learnt = pool["ngram_train_bytes"].mean() if column in _ORDERS else np.nan
            figures = {
                "label": name,
                "bits_per_byte_mean": bits.mean(),
                "perplexity_mean": math.exp(nats) if nats <= math.log(MOST_PERPLEXITY) else math.nan,
                "least": bits.min(),
                "most": bits.max(),
                "ngram_train_bytes": learnt,
                "quality_replicates": int(pool["quality_replicates"].max()),
                "leaks": False,
            }
            rows.append({**{key: pool[key].iloc[0] for key in BUDGET}, **figures})
    return rows
