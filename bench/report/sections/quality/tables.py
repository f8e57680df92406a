"""How well each variant models, as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.groups import SETTING, TRAINING, varying
from bench.report.text import units
from bench.report.text.cells import label_of, or_dash, plus_minus, training_columns
from bench.report.text.columns import Column, each
from bench.report.text.marks import LEAK

HURTS = 0.01
"""Nats per token: a harm that is certainly above it is shown, as `effective_context` counts less as equal."""


def _context(row: pd.Series[Any]) -> str:
    """The effective context and its interval, in tokens; how much more context hurts, if it does."""
    if pd.isna(row["effective_context"]):
        return units.MISSING
    low, high = units.whole(row["effective_context_low"]), units.whole(row["effective_context_high"])
    looks = f"{units.whole(row['effective_context'])} ({low}–{high})"
    if not row["context_harm_low"] > HURTS:
        return looks
    return f"{looks}; hurt by more than {units.whole(row['best_history'])}: +{row['context_harm']:.2f} nats"


def quality(cells: pd.DataFrame) -> list[Column]:
    """Quality of each variant; leak-free cells first, then the best first among comparable cells."""
    rows = [row for _, row in cells.iterrows()]
    ranks = [LEAK if row["leaks"] else units.whole(row["rank"]) for row in rows]
    columns = [
        Column("rank", ranks, optional=False),
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
    ]
    columns += [
        each(cells, key, key, str, right=False)
        for key in varying(cells, SETTING)
        if key not in ("objective", "corpus", "d_model", "heads")
    ]
    return [
        *columns,
        each(cells, "length", "seq_len", str, optional=False),
        each(cells, "width", "d_model", str, optional=False),
        each(cells, "heads", "heads", str, optional=False),
        each(cells, "depth", "depth", str, optional=False),
        *training_columns(cells, varying(cells, TRAINING)),
        each(cells, "tokens trained", "tokens_trained", units.count),
        Column("perplexity", [plus_minus(r["perplexity_mean"], r["perplexity_std"]) for r in rows]),
        Column("reset", [plus_minus(r["perplexity_reset_mean"], r["perplexity_reset_std"]) for r in rows]),
        each(cells, "stride", "eval_stride", units.whole),
        each(cells, "context ≥", "eval_min_context", units.whole),
        Column("looks back", [_context(row) for row in rows]),
        each(cells, "bits per byte", "bits_per_byte_mean", units.score),
        each(cells, "word perplexity", "word_perplexity_mean", units.score),
        each(cells, "unigram", "unigram_perplexity", units.score),
        each(cells, "state", "state_policy", or_dash, right=False),
        each(cells, "replicates", "quality_replicates", str, optional=False),
    ]
