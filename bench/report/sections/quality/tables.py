"""How well each variant models, as a table, with the baselines among the variants."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.baselines import baseline_rows
from bench.report.data.groups import BUDGET, SETTING, TRAINING, varying
from bench.report.data.ranking import OF_BOTH
from bench.report.text import units
from bench.report.text.cells import label_of, or_dash, plus_minus, training_columns
from bench.report.text.columns import Column, each
from bench.report.text.marks import LEAK

HURTS = 0.01
"""Nats per token: a harm that is certainly above it is shown, as `effective_context` counts less as equal."""
BASELINE = "baseline"
"""In the place of a rank."""
OF_REPLICATES_ONLY = "replicates alone where records of an earlier version have no losses by block of text"
SPREAD = 0.01
"""Relative difference of a baseline between cells of a pool from which on it is a range. Cells have different
texts if their budgets are FLOPs or seconds, or if a replicate of one is missing."""


def _context(row: pd.Series[Any]) -> str:
    """The effective context and its interval, in tokens; how much more context hurts, if it does."""
    if pd.isna(row["effective_context"]):
        return units.MISSING
    low, high = units.whole(row["effective_context_low"]), units.whole(row["effective_context_high"])
    looks = f"{units.whole(row['effective_context'])} ({low}–{high})"
    if not row["context_harm_low"] > HURTS:
        return looks
    return f"{looks}; hurt by more than {units.whole(row['best_history'])}: +{row['context_harm']:.2f} nats"


def _bits(row: pd.Series[Any]) -> str:
    """Bits per byte; of a baseline the range, where the cells' texts differ by so much that it matters."""
    if row["baseline"] and row["most"] > (1 + SPREAD) * row["least"]:
        return f"{units.score(row['least'])}–{units.score(row['most'])}"
    return plus_minus(row["bits_per_byte_mean"], row["bits_per_byte_std"])


def _learnt(row: pd.Series[Any]) -> str:
    """Tokens of training; of a table, which has no tokens, bytes."""
    if not row["baseline"]:
        return units.count(row["tokens_trained"])
    size = units.count(row["ngram_train_bytes"])
    return size if size == units.MISSING else f"{size} bytes"


def _reset(row: pd.Series[Any]) -> str:
    name = "perplexity_reset" if pd.isna(row["bits_per_byte_reset_mean"]) else "bits_per_byte_reset"
    return plus_minus(row[f"{name}_mean"], row[f"{name}_std"])


def _rank(row: pd.Series[Any]) -> str:
    """The places that a model may have: from one more than those that are certainly better to the number of
    those that are not certainly worse."""
    if row["baseline"]:
        return BASELINE
    return LEAK if row["leaks"] else units.places(row["rank_low"], row["rank_high"])


def _to_dense(row: pd.Series[Any]) -> str:
    """The difference to dense with its interval: in bits per byte, else in nats per token."""
    if row["baseline"] or pd.isna(row["nll_to_dense"]):
        return units.MISSING
    bits = not pd.isna(row["bits_per_byte_mean"])
    factor = row["bits_per_byte_mean"] / row["nll_mean"] if bits else 1.0
    figures = [factor * row[f"nll_to_dense{end}"] for end in ("", "_low", "_high")]
    return units.difference(*figures)


def with_rows_of_baselines(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells and their baselines, the best of a pool first and what leaks last; `baseline` tells them
    apart."""
    rows = [{**row, "baseline": True} for row in baseline_rows(cells)]
    both = pd.DataFrame([*cells.assign(baseline=False).to_dict("records"), *rows])
    both["least"], both["most"] = (both.get(name, float("nan")) for name in ("least", "most"))
    both["score"] = both["bits_per_byte_mean"].fillna(both["perplexity_mean"])
    return both.sort_values(["leaks", *BUDGET, "score", "label"], ignore_index=True, kind="stable")


def quality(cells: pd.DataFrame) -> list[Column]:
    """Quality of each variant and baseline; leak-free cells first, then the best first among comparable
    cells."""
    varying_settings, varying_training = varying(cells, SETTING), varying(cells, TRAINING)
    cells = with_rows_of_baselines(cells)
    rows = [row for _, row in cells.iterrows()]

    def of_models(title: str, column: str) -> Column:
        """A column of sizes, which a baseline does not have."""
        texts = [units.MISSING if row["baseline"] else str(row[column]) for row in rows]
        return Column(title, texts, optional=False)

    columns = [
        Column("rank", [_rank(row) for row in rows], optional=False),
        Column("variant", [label_of(row) for row in rows], right=False, optional=False),
    ]
    columns += [
        each(cells, key.replace("_", " "), key, str, right=False)
        for key in varying_settings
        if key not in ("objective", "corpus", "d_model", "heads")
    ]
    return [
        *columns,
        each(cells, "length", "seq_len", str, optional=False),
        of_models("width", "d_model"),
        of_models("heads", "heads"),
        of_models("depth", "depth"),
        *training_columns(cells, varying_training),
        Column("tokens trained", [_learnt(row) for row in rows]),
        Column("bits per byte", [_bits(row) for row in rows]),
        Column("− dense", [_to_dense(row) for row in rows]),
        Column("perplexity", [plus_minus(r["perplexity_mean"], r["perplexity_std"]) for r in rows]),
        each(cells, "word perplexity", "word_perplexity_mean", units.score),
        Column("reset", [_reset(row) for row in rows]),
        each(cells, "stride", "eval_stride", units.whole),
        each(cells, "context ≥", "eval_min_context", units.whole),
        Column("looks back", [_context(row) for row in rows]),
        each(cells, "unigram", "unigram_perplexity", units.score),
        each(cells, "tokens dropped", "dropped_tokens_share", units.share),
        each(cells, "busiest expert", "busiest_expert_share", units.share),
        each(cells, "visits / token", "visits_per_token", units.score),
        each(cells, "state", "state_policy", or_dash, right=False),
        each(cells, "replicates", "quality_replicates", str, optional=False),
    ]


def comparable(cells: pd.DataFrame) -> str:
    """With which published figures those of a table may be compared, in a sentence or two."""
    if cells["bits_per_byte_mean"].isna().all():
        return (
            "Perplexity over masked tokens is compared within this table only: no published figure has its "
            "targets."
        )
    corpus = ", ".join(sorted(cells["corpus"].unique()))
    splits = ", ".join(sorted(cells["eval_split"].dropna().unique())) or "held-out"
    scored = _range(cells["tokens_evaluated"], "{:,.0f}".format)
    lengths = _range(cells["seq_len"], "{:,.0f}".format)
    trained = _range(cells["tokens_trained"], units.count)
    return (
        "Bits per byte may be set against published bits per byte, or per character where a character is a "
        f"byte (as for enwik8), of {corpus} only, on the same {splits} split and with an equal context: "
        f"here {scored} targets, windows of {lengths} tokens, after training on {trained} tokens. "
        "Word perplexity may be set against word-level perplexity of the same split, as PG-19's authors "
        "report it. Perplexity is per token and may be set against no word-level or subword perplexity, and "
        "nothing here against a model that was trained on more text."
    )


def families(cells: pd.DataFrame) -> str:
    """How many comparisons the ranks of a table are corrected for, and what intervals and ranks cover."""
    compared = cells[cells["comparisons"] > 0].sort_values("rank_low").drop_duplicates(list(BUDGET))
    if compared.empty:
        return ""
    over = "replicates and text" if (compared["doubt"] == OF_BOTH).all() else OF_REPLICATES_ONLY
    sizes = sorted({int(size) for size in compared.loc[compared["rank_low"].notna(), "comparisons"]})
    if not sizes:
        return f"The intervals of − dense are over {over}."
    count = "1 comparison" if sizes == [1] else f"{' or '.join(map(str, sizes))} comparisons"
    family = "in each length, model and budget" if len(compared) > 1 else "in all"
    return f"Ranks are corrected for {count} {family}. Ranks and the intervals of − dense are over {over}."


def _range(values: pd.Series[Any], show: Any) -> str:
    known = values.dropna()
    if known.empty:
        return "an unknown number of"
    low, high = show(float(known.min())), show(float(known.max()))
    return low if low == high else f"{low} to {high}"
