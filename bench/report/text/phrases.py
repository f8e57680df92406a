"""Settings in words: headings of tables, and the training of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records import NOT_COMPILED, Record
from bench.records.record import MODEL_OPTIONS
from bench.report.data.groups import GROUP, SLOT_COLUMNS, TRAINING, split, varying
from bench.report.text import units

_PHRASES = {
    "corpus": "data {}",
    "data": "data {}",
    "d_model": "width {}",
    "heads": "{} heads",
    "feed_forward_layer": "feed-forward {}",
    "depth_schedule": "depth schedule {}",
    "ff_chunks": "feed-forward in {} pieces",
    "vocab_size": "vocabulary {}",
    "tie_embeddings": "embeddings {}",
    "rotary_base": "rotary base {}",
    "head_size": "heads of {} channels",
    "kv_heads": "key and value heads: {}",
    "widen_feed_forward": "feed-forward layers {}",
    "embedding_size": "embedding of {} channels",
    "norm": "norm {}",
    "norm_position": "{}-norm",
    "residual": "residual {}",
    "dropout": "dropout {}",
    "batch_size": "batch {}",
    "threads": "{} threads",
    "activations": "activations {}",
    "compile": "compile {}",
    "depth": "depth {}",
    "seq_len": "length {}",
}


_USUAL = {
    "ff_chunks": Record.ff_chunks,
    **MODEL_OPTIONS,
    **{column: getattr(Record, key) for key, column in SLOT_COLUMNS.items()},
    "compile": NOT_COMPILED,
}
"""Values that are not mentioned."""


def describe(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The keys' values in words: 'clm, width 64, 4 heads, batch 4'."""
    return ", ".join(_phrase(key, values[key]) for key in keys if not _usual(key, values[key]))


def _usual(key: str, value: Any) -> bool:
    """Whether the key's value is the usual one, which is not mentioned."""
    return key in _USUAL and value == _USUAL[key]


def _phrase(key: str, value: Any) -> str:
    if key == "budget_bytes":
        return f"budget {units.size(value, short=True)}"
    phrase = _PHRASES.get(key, "{}")
    if phrase.startswith("{} ") and str(value) == "1":
        phrase = phrase.removesuffix("s")  # 1 thread, 1 head
    return phrase.format(value)


def training(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """The training and scoring in words, for those keys of `TRAINING` that are in `keys`: '400 k tokens',
    'rate 0.003', 'validation', 'stride 256' (where windows of `seq_len` overlap)."""
    words = []
    if "train_budget" in keys or "train_amount" in keys:
        words.append(units.budget(values["train_budget"], values["train_amount"]))
    if "schedule" in keys and values["schedule"] != "cosine":
        words.append(f"schedule {values['schedule']}")
    if "train_state" in keys and values["train_state"] == "carried":
        words.append("state carried between steps")
    if "learning_rate" in keys:
        words.append(f"rate {units.learning_rate(values['learning_rate'])}")
    if "search_budget" in keys and values["search_budget"] == "largest":
        words.append("rate searched with the whole training")
    if "eval_split" in keys:
        words.append(str(values["eval_split"]))
    side_by_side = values.get("seq_len")
    if (
        "eval_stride" in keys
        and not units.missing(values["eval_stride"])
        and values["eval_stride"] != side_by_side
    ):
        words.append(f"stride {units.whole(values['eval_stride'])}")
    return words


def trained(row: pd.Series[Any]) -> str:
    """How a row's model was trained and scored: '400 k tokens, test'."""
    values = {key: row[key] for key in (*TRAINING, "seq_len")}
    known = [key for key in TRAINING if key != "learning_rate" and not pd.isna(values[key])]
    return ", ".join(training(values, known))


def headed(cells: pd.DataFrame, keys: Sequence[str] = GROUP) -> list[tuple[str, str, pd.DataFrame]]:
    """The cells by group: a heading of the keys that vary, all keys in words, the group's cells."""
    different = varying(cells, keys)
    named = [k for k in keys if k in ("objective", "depth", *different)]
    return [(describe(values, named), describe(values, keys), part) for values, part in split(cells, keys)]
