"""Records into one frame to compute on: checked, labelled, and without superseded measurements."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench import records
from bench.records import Record
from bench.report.groups import TRAINING

UNKNOWN = "unknown"
_HINTS = typing.get_type_hints(Record)
_FIGURES = [k for k, hint in _HINTS.items() if {int, float} & set(typing.get_args(hint)) and k != "threads"]
_IDENTITY = ["variant", "params_json", "impl", "seq_len", "depth", "d_model", "heads", "ff_chunks"]
_IDENTITY += [
    "batch_size",
    "activations",
    "objective",
    "corpus",
    "measure",
    "dtype",
    "device",
    "machine",
    "threads",
]
_IDENTITY += [*TRAINING, "replicate", "twin"]


@dataclass(frozen=True)
class Collected:
    """An experiment's records, ready to be aggregated.

    `frame` has one row a current record: the record's keys and `params_json`, `label`, `machine`, `knobs`
    (those of `data_params` that differ among the rows of its data, in words) and `corpus` (the data with
    them; where only its hash differs, with that). It leaves out twins, cells that were measured again to
    see by how much two measurements of the same differ; `every` has them too. `records` are all that could
    be read. `superseded` counts records that a newer version of the code measured again, `alike` those
    that share every key of a cell, its replicate and its twin with another one.
    """

    frame: pd.DataFrame
    every: pd.DataFrame
    records: list[Record]
    problems: list[str]
    superseded: int
    alike: int


def collect(folder: Path) -> Collected:
    """Read an experiment's folder; files that are not records become lines in `problems`."""
    found, problems = records.read_all(folder)
    good: list[Record] = []
    for record in found:
        wrong = [k for k, hint in _HINTS.items() if not _fits(getattr(record, k), hint)]
        if wrong:
            path = records.path_of(folder, str(record.cell_id))
            problems.append(f"{path}: wrong type in {', '.join(wrong)}")
        else:
            good.append(record)
    if not good:
        return Collected(pd.DataFrame(), pd.DataFrame(), [], problems, 0, 0)
    frame = labelled(_table(good))
    current = _current(frame)
    alike = int(current.duplicated(_IDENTITY).sum())
    once = current[current["twin"] == 0]
    return Collected(once, current, good, problems, len(frame) - len(current), alike)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value read from JSON has the type the record declares; int serves as float."""
    if typing.get_origin(hint) is types.UnionType:
        return any(_fits(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        # A non-finite element was written as null.
        return isinstance(value, list) and all(v is None or _fits(v, float) for v in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _table(found: Sequence[Record]) -> pd.DataFrame:
    """One row a record; figures as floats with NaN for null, because FLOPs can pass 64 bits."""
    frame = pd.DataFrame([dataclasses.asdict(r) for r in found], columns=list(records.KEYS))
    frame[_FIGURES] = frame[_FIGURES].astype(float).replace([math.inf, -math.inf], math.nan)
    frame["params_json"] = [json.dumps(r.variant_params, sort_keys=True, default=str) for r in found]
    frame["data_json"] = [
        None if r.data_params is None else json.dumps(r.data_params, sort_keys=True, default=str)
        for r in found
    ]
    return frame


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Add what the groups need, filling what a cell that failed early, or an older record, could not say."""
    frame = frame.copy()
    frame["machine"] = _filled(frame, "device_name", ["device"], frame["cpu_model"])
    frame["threads"] = [
        UNKNOWN if value == UNKNOWN else str(int(float(value)))
        for value in _filled(frame, "threads", ["device"])
    ]
    frame["measure"] = _filled(frame, "measure", [])
    for key in TRAINING:
        frame[key] = _only(frame[key], [frame["measure"]])
    read_alike = [frame[k] for k in ("measure", "seq_len", "objective")]
    frame["eval_stride"] = _only(frame["eval_stride"], read_alike)
    frame["train_amount"] = frame["train_amount"].fillna(frame["tokens_trained"])
    frame["impl"] = _filled(frame, "impl", ["variant", "params_json"])
    texts = _only(frame["data_json"], [frame["data"], frame["data_sha256"]]).fillna("{}")
    frame["data_params"] = [json.loads(text) for text in texts]
    frame["knobs"] = _differing(frame["data"], frame["data_params"])
    frame["corpus"] = frame["data"].where(frame["knobs"] == "", frame["data"] + " (" + frame["knobs"] + ")")
    hashes = frame.groupby("corpus")["data_sha256"].transform("nunique")
    frame["corpus"] = frame["corpus"].where(hashes <= 1, frame["corpus"] + "@" + frame["data_sha256"].str[:8])
    frame["label"] = labels(frame)
    return frame


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


def labels(frame: pd.DataFrame) -> list[str]:
    """Each row's variant, with those of its parameters that differ among the variant's rows.

    'longformer' alone, 'longformer (window=64)' where other rows have another window. The
    implementation counts as a parameter. Rows of one variant share a label only if they share
    all parameters.
    """
    knobs = [
        {**json.loads(params), **({} if impl == UNKNOWN else {"impl": impl})}
        for params, impl in zip(frame["params_json"], frame["impl"], strict=True)
    ]
    shown = _differing(frame["variant"], knobs)
    return [
        f"{variant} ({words})" if words else str(variant)
        for variant, words in zip(frame["variant"], shown, strict=True)
    ]


def _differing(names: Iterable[str], knobs: Iterable[dict[str, Any]]) -> list[str]:
    """For each row, those of its knobs in words that differ among the rows of its name: 'n_pairs=4'."""
    rows = list(zip(names, knobs, strict=True))
    absent = "\0"
    differing: dict[str, list[str]] = {}
    for name in {name for name, _ in rows}:
        own = [knob for other, knob in rows if other == name]
        keys = sorted({key for knob in own for key in knob})
        values = {key: {json.dumps(k[key]) if key in k else absent for k in own} for key in keys}
        differing[name] = [key for key in keys if len(values[key]) > 1]
    return [
        ", ".join(f"{key}={spoken(knob[key])}" for key in differing[name] if key in knob)
        for name, knob in rows
    ]


def spoken(value: object) -> str:
    """A parameter's value without the quotes JSON would put round a word."""
    return value if isinstance(value, str) else json.dumps(value)


def _current(frame: pd.DataFrame) -> pd.DataFrame:
    """Without records whose very cell was measured again by newer code.

    An old record stays in the folder when the code changes, because the code is part of a
    cell's name. Counting both would pass one replicate off as two.
    """
    keep = pd.Series(True, index=frame.index)
    known = frame[frame["code_sha256"].notna()].sort_values(["started_at", "cell_id"], kind="stable")
    for _, same in known.groupby(_IDENTITY, sort=False, dropna=False):
        keep[same.index] = same["code_sha256"] == same["code_sha256"].iloc[-1]
    return frame[keep]
