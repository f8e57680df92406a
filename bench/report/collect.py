"""Records into one frame to compute on: checked, labelled, and without superseded measurements."""

from __future__ import annotations

import hashlib
import json
import typing
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from bench import records
from bench.inputs.printable import printable
from bench.records import Record
from bench.report.groups import TRAINING

UNKNOWN = "unknown"
_HINTS = typing.get_type_hints(Record)
_FIGURES = [k for k, hint in _HINTS.items() if {int, float} & set(typing.get_args(hint)) and k != "threads"]
_SENTENCES = {"reason", "cost_ratio_reason", "claim_source", "contaminated", "cell_id"}
"""Texts that may be long, which a table shortens, and the one that names files."""
_TEXTS = [k for k, hint in _HINTS.items() if hint in (str, str | None) and k not in _SENTENCES]
MOST, MOST_KNOBS = 80, 200
"""Characters of any other text, such as a name, and of a row's knobs that are shown; a longer one ends with a
hash of all of it."""
MOST_PERPLEXITY = 1e100
"""Of a loss of 230 nats. What is more counts as null: it fits no axis, nor its square a float."""
_CONFIGURATION = ["variant", "params_json", "impl", "seq_len", "depth", "d_model", "heads", "ff_chunks"]
_CONFIGURATION += [
    "batch_size",
    "activations",
    "objective",
    "data",
    "data_json",
    "measure",
    "dtype",
    "device",
]
_CONFIGURATION += ["machine", "threads", "budget_bytes", *TRAINING]
"""What makes two records ones of the same configuration, but for code, the data's content and the seed."""
_IDENTITY = [key for key in _CONFIGURATION if key not in ("data", "data_json", "budget_bytes")]
_IDENTITY += ["corpus", "replicate", "twin"]


@dataclass(frozen=True)
class Collected:
    """An experiment's records, ready to be aggregated.

    `frame` has one row a current record: the record's keys and `params_json`, `label`, `machine`, `knobs`
    (those of `data_params` that differ among the rows of its data, in words) and `corpus` (the data with
    them; where only its hash differs, with that). It leaves out twins, cells that were measured again to
    see by how much two measurements of the same differ; `every` has them too. `records` are all that could
    be read. `stale` says by cell why a record is in neither frame; `alike` counts records that share every
    key of a cell, its replicate and its twin with another one.
    """

    frame: pd.DataFrame
    every: pd.DataFrame
    records: list[Record]
    problems: list[str]
    stale: dict[str, str]
    alike: int


def collect(folder: Path) -> Collected:
    """Read an experiment's folder; files that are not records become lines in `problems`."""
    found, problems = records.read_all(folder)
    if not found:
        return Collected(pd.DataFrame(), pd.DataFrame(), [], problems, {}, 0)
    frame = _filled_in(_table(found))
    why = _stale(frame)
    current = _labelled(frame[why.isna()])
    alike = int(current.duplicated(_IDENTITY).sum())
    once = current[current["twin"] == 0]
    stale = dict(zip(frame["cell_id"][why.notna()], why.dropna(), strict=True))
    return Collected(once, current, found, problems, stale, alike)


def _table(found: list[Record]) -> pd.DataFrame:
    """One row a record; figures as floats with NaN for null, because FLOPs can pass 64 bits."""
    columns = records.columns_of(found)
    for key in _TEXTS:
        names = {text: None if text is None else _shown(text) for text in set(columns[key])}
        columns[key] = [names[text] for text in columns[key]]
    columns["params_json"] = _as_json(columns["variant_params"])
    columns["data_json"] = _as_json(columns["data_params"])
    columns["written"] = [record.written for record in found]
    frame = pd.DataFrame(columns).astype(dict.fromkeys(_FIGURES, float))
    for key in ("perplexity", "word_perplexity", "unigram_perplexity"):
        frame[key] = frame[key].where(frame[key] <= MOST_PERPLEXITY)
    return frame


def _shown(text: str, most: int = MOST) -> str:
    """A name as tables and plots have it: on one line, all of it ink, and not too long."""
    if len(text) <= most and text.isprintable():
        return text
    line = printable(text, most)
    if len(line) <= most and len(text) <= most:
        return line
    return f"{line[: most - 10]}…{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _as_json(values: Iterable[dict[str, Any] | None]) -> list[str | None]:
    return [None if value is None else json.dumps(value, sort_keys=True) for value in values]


def relabelled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of several frames together, filled in and labelled by what tells apart all of them."""
    return _labelled(_filled_in(frame))


def _filled_in(frame: pd.DataFrame) -> pd.DataFrame:
    """Add what tells cells apart, filling what one that failed early could not say from its peers."""
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
    frame["data_json"] = _only(frame["data_json"], [frame["data"], frame["data_sha256"]]).fillna("{}")
    return frame


def _stale(frame: pd.DataFrame) -> pd.Series[Any]:
    """Why a record does not count, null where it does: its configuration was measured later with other code
    or other data, in whatever replicate.

    An old record stays in the folder when the code changes, because the code is part of a cell's name.
    Counting both would pass one replicate off as two, and average two programs.
    """
    why = pd.Series(None, index=frame.index, dtype=object)
    known = frame[frame["code_sha256"].notna()].sort_values(["written", "cell_id"], kind="stable")
    same = known.groupby(_CONFIGURATION, sort=False, dropna=False)
    for key, words in (("data_sha256", "data"), ("code_sha256", "code")):
        last = same[key].transform("last")
        other = known.index[known[key] != last]
        why[other] = [
            f"measured with {words} {mine}; the newest of its configuration with {its}"
            for mine, its in zip(known[key][other], last[other], strict=True)
        ]
    return why


def _labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Add what cells are called by."""
    frame = frame.copy()
    frame["data_params"] = [json.loads(text) for text in frame["data_json"]]
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
    values: dict[str, dict[str, set[str | None]]] = {}
    counts = Counter(name for name, _ in rows)
    seen: Counter[tuple[str, str]] = Counter()
    for name, own in rows:
        for key, value in own.items():
            values.setdefault(name, {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
            seen[name, key] += 1
    for (name, key), times in seen.items():
        if times < counts[name]:  # absent from some
            values[name][key].add(None)
    apart = {name: sorted(key for key, of in keys.items() if len(of) > 1) for name, keys in values.items()}
    words = (
        ", ".join(f"{_shown(key)}={_shown(spoken(own[key]))}" for key in apart.get(name, ()) if key in own)
        for name, own in rows
    )
    return [_shown(one, MOST_KNOBS) for one in words]


def spoken(value: object) -> str:
    """A parameter's value without the quotes JSON would put round a word."""
    return value if isinstance(value, str) else json.dumps(value)
