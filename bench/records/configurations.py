"""The configuration of each record, and the stale records: measured again since with other code or data.

A record of a cell that failed early lacks keys that its peers have. The keys are filled in from these peers
before configurations are compared.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pandas as pd

from bench.records.record import MODEL_OPTIONS, NOT_COMPILED, SLOTS, SWITCHED_ON, Record
from bench.records.store import columns_of

UNKNOWN = "unknown"
"""A text that no record of the same kind has."""
PLANNED = "planned without the device"
"""The machine of a plan of a device that the planning machine does not have."""
TRAINING_KEYS = (
    "train_budget",
    "train_amount",
    "schedule",
    "train_state",
    "learning_rate",
    "search_budget",
    "eval_split",
    "eval_stride",
)
"""How a model was trained and scored."""
OTHER_PARAMS = (*SLOTS, "data")
"""What has knobs in a record, `<name>_params`, beside the variant."""
CONFIGURATION = (
    "variant",
    "params_json",
    "impl",
    "seq_len",
    "depth",
    "d_model",
    "heads",
    "feed_forward",
    "feed_forward_json",
    "stack",
    "stack_json",
    "ff_chunks",
    *MODEL_OPTIONS,
    "batch_size",
    "activations",
    "compile",
    "objective",
    "data",
    "data_json",
    "measure",
    "dtype",
    "device",
    "machine",
    "threads",
    "budget_bytes",
    "reserve",
    *TRAINING_KEYS,
)
"""Columns of `filled_in` that records of one configuration share; the code, the content of the data and the
seed are not among them."""

_HINTS = typing.get_type_hints(Record)
_FIGURES = [k for k, hint in _HINTS.items() if {int, float} & set(typing.get_args(hint)) and k != "threads"]
_SENTENCES = {"reason", "cost_ratio_reason", "claim_source", "contaminated", "cell_id"}
"""Texts that may be long, which a table shortens, and the one that names files."""
_TEXTS = [k for k, hint in _HINTS.items() if hint in (str, str | None) and k not in _SENTENCES]


def table(records: list[Record], show: Callable[[str], str] = str) -> pd.DataFrame:
    """One row a record: its keys, `params_json`, `<name>_json` for each of `OTHER_PARAMS`, and `written`.

    Figures are floats with NaN for null, because FLOPs can exceed 64 bits. `show` changes the texts that are
    names; it must keep different names different.
    """
    columns = columns_of(records)
    for key in _TEXTS:
        names = {text: None if text is None else show(text) for text in set(columns[key])}
        columns[key] = [names[text] for text in columns[key]]
    columns["params_json"] = _as_json(columns["variant_params"])
    for name in OTHER_PARAMS:
        columns[f"{name}_json"] = _as_json(map(_without_nulls, columns[f"{name}_params"]))
    columns["written"] = [record.order for record in records]
    return pd.DataFrame(columns).astype(dict.fromkeys(_FIGURES, float))


def _without_nulls(params: dict[str, Any] | None) -> dict[str, Any] | None:
    """The knobs of an entry without those that are null, as are those that older records lack."""
    return None if params is None else {key: value for key, value in params.items() if value is not None}


def _as_json(values: Iterable[dict[str, Any] | None]) -> list[str | None]:
    return [None if value is None else json.dumps(value, sort_keys=True) for value in values]


def filled_in(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy of `table` with `machine` and `data_known`: whether the knobs of the data are. Null keys of
    `CONFIGURATION` are filled in from a row's peers."""
    frame = frame.copy()
    frame["machine"] = _filled(frame, "device_name", ["device"], _unnamed_machine(frame))
    frame["threads"] = [
        UNKNOWN if value == UNKNOWN else str(int(float(value)))
        for value in _filled(frame, "threads", ["device"])
    ]
    frame["compile"] = frame["compile"].fillna(NOT_COMPILED)  # older records do not contain it
    for key, usual in MODEL_OPTIONS.items():
        words = frame[key].map(partial(_option, key), na_action="ignore").astype(object)
        frame[key] = words.where(words.notna(), usual)
    frame["reserve"] = frame["reserve"].fillna(0.0)  # of older records
    frame["measure"] = _filled(frame, "measure", [])
    is_trained = frame["train_budget"].notna()
    for key, older in (("schedule", "cosine"), ("train_state", "fresh")):  # older records do not contain them
        frame[key] = frame[key].where(frame[key].notna() | ~is_trained, older)
    for key in TRAINING_KEYS:
        frame[key] = _only(frame[key], [frame["measure"]])
    read_alike = [frame[k] for k in ("measure", "seq_len", "objective")]
    frame["eval_stride"] = _only(frame["eval_stride"], read_alike)
    frame["train_amount"] = frame["train_amount"].fillna(frame["tokens_trained"])
    frame["impl"] = _filled(frame, "impl", ["variant", "params_json"])
    data = _only(frame["data_json"], [frame["data"], frame["data_sha256"]])
    frame["data_json"], frame["data_known"] = data.fillna("{}"), data.notna()
    for slot in SLOTS:  # older records do not contain the knobs; null if their peers have several values
        frame[f"{slot}_json"] = _only(frame[f"{slot}_json"], [frame[slot]])
    return frame


def _option(key: str, value: float | bool | str) -> str:
    """An option of the model as text: 'tied', '50257'. Text stays as it is."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return SWITCHED_ON[key] if value else MODEL_OPTIONS[key]
    return f"{value:.15g}"


def _unnamed_machine(frame: pd.DataFrame) -> pd.Series[Any]:
    """The machine of a record without the name of its device: the processor for cells on the CPU, `PLANNED`
    for a plan of a device that the machine does not have, null for other cells."""
    names = frame["cpu_model"].astype(object).where(frame["device"] == "cpu", None)
    is_planned = (frame["device"] != "cpu") & (frame["flops_source"] == "predicted")
    return names.where(~is_planned, PLANNED)


def _filled(frame: pd.DataFrame, key: str, within: list[str], other: Any = None) -> list[str]:
    """The key as text; a null takes the only value its peers have, else `other`, else 'unknown'."""
    values = frame[key].astype(object)
    values = _only(values, [frame[k] for k in within] or [pd.Series(0, index=frame.index)])
    if other is not None:
        values = values.where(values.notna(), other.astype(object))
    return [UNKNOWN if pd.isna(value) else str(value) for value in values]


def _only(values: pd.Series[Any], peers: Sequence[pd.Series[Any]]) -> pd.Series[Any]:
    """The values; a null takes the only value that its peers, the rows of the same keys, have."""
    grouped = values.groupby(list(peers))
    only = grouped.transform("first").where(grouped.transform("nunique") == 1)
    return values.where(values.notna(), only)


def stale(frame: pd.DataFrame) -> pd.Series[Any]:
    """For each row of `filled_in` the reason why its record is stale, null for a current one.

    A record is stale if its configuration was measured later with other code or other data, in any replicate.
    An old record stays in the folder when the code changes, because the code is part of a cell's name; to
    count both would take one replicate for two, and average two programs.
    """
    why = pd.Series(None, index=frame.index, dtype=object)
    known = frame[frame["code_sha256"].notna()].sort_values(["written", "cell_id"], kind="stable")
    same = known.groupby(list(CONFIGURATION), sort=False, dropna=False)
    for key, words in (("data_sha256", "data"), ("code_sha256", "code")):
        last = same[key].transform("last")
        other = known.index[known[key] != last]
        why[other] = [
            f"measured with {words} {mine}; the newest of its configuration with {its}"
            for mine, its in zip(known[key][other], last[other], strict=True)
        ]
    return why


def reasons(frame: pd.DataFrame) -> dict[str, str]:
    """The cells of the stale records of `filled_in`, each with the reason."""
    why = stale(frame)
    return dict(zip(frame["cell_id"][why.notna()], why.dropna(), strict=True))
