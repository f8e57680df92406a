"""What may be compared: the keys of a cell that must agree, how they are said, and file names.

A *setting* is everything that two cells must share to stand in one table or figure. Within it
depth makes the panels, and label (a variant and the parameters that tell it apart) and
sequence length make the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.report import units

SETTING = (
    "objective",
    "corpus",
    "d_model",
    "heads",
    "ff_chunks",
    "batch_size",
    "dtype",
    "device",
    "machine",
    "threads",
    "activations",
)
GROUP = (*SETTING, "depth")
CELL = (*GROUP, "variant", "label", "seq_len")
COMMON = tuple(key for key in SETTING if key != "activations")
"""What two ways of saving activations must share to be compared."""
TRAINING = ("train_budget", "train_amount", "learning_rate", "eval_split", "eval_stride")
"""What two trained models must share for their quality to be averaged."""
FIT = (*COMMON, "budget_bytes", "seq_len")
"""What answers to what fits must share to stand in one table or figure."""
PAYOFF = tuple(key for key in FIT if key != "batch_size")
"""The same where the batch is itself the answer."""
TASK = tuple("data" if key == "corpus" else key for key in SETTING)
"""What must agree where a task's knobs are an axis and not a setting."""

_PHRASES = {
    "corpus": "data {}",
    "data": "data {}",
    "d_model": "width {}",
    "heads": "{} heads",
    "ff_chunks": "feed-forward in {} pieces",
    "batch_size": "batch {}",
    "threads": "{} threads",
    "activations": "activations {}",
    "depth": "depth {}",
    "seq_len": "length {}",
}


def varying(frame: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The keys that have more than one value in the frame, in the order given."""
    return [key for key in keys if frame[key].nunique(dropna=False) > 1]


def describe(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The keys' values in words: 'clm, width 64, 4 heads, batch 4'."""
    return ", ".join(_phrase(key, values[key]) for key in keys if not _usual(key, values[key]))


def _usual(key: str, value: Any) -> bool:
    """Whether the key at this value goes without saying."""
    return key == "ff_chunks" and value == 1


def _phrase(key: str, value: Any) -> str:
    if key == "budget_bytes":
        return f"budget {units.size(value, short=True)}"
    return _PHRASES.get(key, "{}").format(value)


def training(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """What was trained on and scored, for those keys of `TRAINING` that are asked for: '400 k tokens',
    'rate 0.003', 'validation', 'stride 256' (where windows of `seq_len` overlap)."""
    words = []
    if "train_budget" in keys or "train_amount" in keys:
        words.append(units.budget(values["train_budget"], values["train_amount"]))
    if "learning_rate" in keys:
        words.append(f"rate {units.learning_rate(values['learning_rate'])}")
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


def split(frame: pd.DataFrame, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The frame's parts by the keys' values, in order, each with those values by name."""
    parts = frame.groupby(list(keys), sort=False, dropna=False)
    for values, part in sorted(parts, key=lambda pair: [natural(value) for value in pair[0]]):
        yield dict(zip(keys, values, strict=True)), part


def natural(value: object) -> tuple[Any, ...]:
    """What sorts numbers within texts as numbers, 'n_pairs=4' before 'n_pairs=16', and nulls last."""
    if value is None or value != value:
        return (1,)
    if not isinstance(value, str):
        return 0, value
    words = re.split(r"(\d+(?:\.\d+)?)", value)
    return 0, tuple(float(word) if place % 2 else word for place, word in enumerate(words))


def suffix(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The part of a file name that tells settings apart: '-clm-d_model=64' without odd characters."""
    words = [str(values[key]) if key == "objective" else f"{key}_{values[key]}" for key in keys]
    return "".join("-" + re.sub(r"[^A-Za-z0-9._]+", "_", word).strip("_") for word in words)
