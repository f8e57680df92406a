"""The keys of a cell that must agree for a comparison, and their part in file names.

A *setting* is everything that two cells must share to be in one table or figure. Within a setting each depth
is a panel, and label (a variant and the parameters that distinguish it) and sequence length are the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records.configurations import TRAINING_KEYS
from bench.records.record import MODEL_OPTIONS

SLOT_COLUMNS = {"feed_forward": "feed_forward_layer", "stack": "depth_schedule"}
"""Key of a record that names what fills a slot of the model → the column with that entry and those of its
knobs that differ, in words."""
SETTING = (
    "objective",
    "corpus",
    "d_model",
    "heads",
    *SLOT_COLUMNS.values(),
    "ff_chunks",
    *MODEL_OPTIONS,
    "batch_size",
    "dtype",
    "device",
    "machine",
    "threads",
    "compile",
    "activations",
)
GROUP = (*SETTING, "depth")
CELL = (*GROUP, "variant", "label", "seq_len")
COMMON = tuple(key for key in SETTING if key != "activations")
"""Keys that two activation strategies must share to be compared."""
TRAINING = TRAINING_KEYS
"""Keys that two trained models must share for their quality to be averaged."""
BUDGET = (*GROUP, "seq_len", *(key for key in TRAINING if key != "learning_rate"))
"""Keys that cells must share for their ranks to be comparable; each may have its own learning rate."""
SEARCH = [*CELL, *(key for key in TRAINING if key != "learning_rate")]
"""Keys that the learning rates of one search share."""
FIT = (*COMMON, "budget_bytes", "seq_len")
"""Keys that cells asked for what fits must share to be in one table or figure."""
PAYOFF = tuple(key for key in FIT if key != "batch_size")
"""The same where the batch is itself the answer."""
TASK = tuple("data" if key == "corpus" else key for key in SETTING)
"""Keys that must agree where a task's knobs are an axis and not part of the setting."""
NUMBER = "number"
"""Column of rows: which group they belong to; see `numbered`."""


def numbered(rows: pd.DataFrame, keys: Sequence[str]) -> pd.Series[int]:
    """The number of each row's group, from 0 on in order of appearance; null is a value like others.

    Grouping by the dozens of keys of a cell costs as much as a dozen medians. So it is done once, and
    everything else is grouped by the number.
    """
    return rows.groupby(list(keys), sort=False, dropna=False).ngroup()


def keyed(rows: pd.DataFrame, keys: Sequence[str], columns: Mapping[str, pd.Series[Any]]) -> pd.DataFrame:
    """A row a group: the keys, then the columns, which are by number. Takes the rows with their `NUMBER`."""
    first = rows.drop_duplicates(NUMBER).set_index(NUMBER)[list(keys)]
    return first.join(pd.DataFrame(columns, index=first.index))


def varying(frame: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The keys that have more than one value in the frame, in the order given."""
    if len(frame) < 2:
        return []
    return [key for key in keys if frame[key].nunique(dropna=False) > 1]


def split(frame: pd.DataFrame, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The frame's parts by the keys' values, in order, each with those values by name."""
    parts = frame.groupby(list(keys), sort=False, dropna=False)
    for values, part in sorted(parts, key=lambda pair: [natural(value) for value in pair[0]]):
        yield dict(zip(keys, values, strict=True)), part


def with_lines(cells: pd.DataFrame, panel: str, axis: str) -> pd.DataFrame:
    """The cells of the panels that have several places on their axis; all cells if no panel has."""
    has_line = cells.groupby(panel)[axis].transform("nunique") > 1
    return cells[has_line] if has_line.any() else cells


def natural(value: object) -> tuple[Any, ...]:
    """A sort key that orders numbers within texts as numbers, 'n_pairs=4' before 'n_pairs=16', and nulls
    last."""
    if value is None or value != value:
        return (1,)
    if not isinstance(value, str):
        return 0, value
    words = re.split(r"(\d+(?:\.\d+)?)", value)
    return 0, tuple(float(word) if place % 2 else word for place, word in enumerate(words))


def suffix(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The part of a file name that identifies a setting: '-clm-d_model=64' without odd characters."""
    words = [str(values[key]) if key == "objective" else f"{key}_{values[key]}" for key in keys]
    return "".join("-" + re.sub(r"[^A-Za-z0-9._]+", "_", word).strip("_") for word in words)
