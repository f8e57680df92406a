"""Records into one frame to compute on: checked, labelled, and without superseded measurements."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from bench import records
from bench.inputs.printable import printable
from bench.records import Record
from bench.records.configurations import CONFIGURATION, UNKNOWN, filled_in, reasons, table
from bench.report.data.compared_time import with_compared_time
from bench.report.data.groups import SLOT_COLUMNS
from variants.facts import layers_knob

MOST, MOST_KNOBS = 80, 200
"""Characters of a name, and of a row's knobs, that are shown; a longer text ends with a hash of all of it."""
MOST_PERPLEXITY = 1e100
"""The perplexity of a loss of 230 nats. A larger one counts as null: no axis can show it, and its square is
no float."""
_IDENTITY = [key for key in CONFIGURATION if key not in ("data", "data_json", "budget_bytes", "reserve")]
_IDENTITY += ["corpus", "replicate", "twin"]


@dataclass(frozen=True)
class Collected:
    """An experiment's records, ready to be aggregated.

    `frame` has one row a current record: the record's keys and `params_json`, `label`, `machine`, `knobs`
    (those of `data_params` that differ among the rows of its data, in words), `corpus` (the data with
    them; where only its hash differs, with that), the columns `feed_forward_layer` and `depth_schedule` (the
    entry of the slot with those of its knobs that differ), and those of `compared_time`. It leaves out twins,
    cells that were measured again to see by how much two measurements of the same differ; `every` has them
    too. `records` are all that could be read. `stale` says by cell why a record is in neither frame; `alike`
    counts records
    that share every key of a cell, its replicate and its twin with another one.
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
    frame = table(found, _shown)
    for key in ("perplexity", "word_perplexity", "unigram_perplexity"):
        frame[key] = frame[key].where(frame[key] <= MOST_PERPLEXITY)
    frame = filled_in(frame)
    stale = reasons(frame)
    current = with_compared_time(_labelled(frame[~frame["cell_id"].isin(stale)])).copy()
    alike = int(current.duplicated(_IDENTITY).sum())
    once = current[current["twin"] == 0]
    return Collected(once, current, found, problems, stale, alike)


def _shown(text: str, most: int = MOST) -> str:
    """A name as tables and plots have it: on one line, all of it ink, and not too long."""
    if len(text) <= most and text.isprintable():
        return text
    line = printable(text, most)
    if len(line) <= most and len(text) <= most:
        return line
    return f"{line[: most - 10]}…{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def relabelled(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of several frames together, filled in and labelled by the parameters that differ among all of
    them."""
    return _labelled(filled_in(frame))


def _labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """Add the names of cells: `data_params`, `knobs`, `corpus`, `label` and those of `SLOT_COLUMNS`."""
    frame = frame.copy()
    frame["data_params"] = [json.loads(text) for text in frame["data_json"]]
    frame["knobs"] = [_in_words(own) for own in _differing(frame["data"], frame["data_params"])]
    frame["corpus"] = frame["data"].where(frame["knobs"] == "", frame["data"] + " (" + frame["knobs"] + ")")
    hashes = frame.groupby("corpus")["data_sha256"].transform("nunique")
    frame["corpus"] = frame["corpus"].where(hashes <= 1, frame["corpus"] + "@" + frame["data_sha256"].str[:8])
    for slot, column in SLOT_COLUMNS.items():
        frame[column] = slot_names(frame[slot], frame[f"{slot}_json"])
    frame["label"] = labels(frame)
    return frame


def labels(frame: pd.DataFrame) -> list[str]:
    """Each row's variant, with those of its parameters that differ among the variant's rows.

    'longformer' alone, 'longformer (window=64)' where other rows have another window. Mixtures with different
    layers have these as their name: '3×longformer (window=64) + dense'. The implementation counts as a
    parameter where the variant has such a knob, else only where records differ in nothing but it. Rows of one
    variant share a label only if they share all parameters.
    """
    knobs = [
        {**own, **({"impl": impl} if impl != UNKNOWN and ("impl" in own or decides) else {})}
        for own, impl, decides in zip(
            map(json.loads, frame["params_json"]), frame["impl"], _decided_by_impl(frame), strict=True
        )
    ]
    names = list(frame["variant"])
    layers = {name: layers_knob(str(name)) for name in set(names)}
    several = sum(knob is not None for knob in layers.values()) > 1
    return [
        _label(str(name), own, layers[name], several=several)
        for name, own in zip(names, _differing(names, knobs), strict=True)
    ]


def _label(variant: str, knobs: dict[str, Any], layers: str | None, *, several: bool) -> str:
    """See `labels`. `layers` is the knob of a mixture that lists its layers; of `several` variants with such
    knobs, each label begins with the variant."""
    listed = knobs.get(layers or "")
    if isinstance(listed, list) and listed:
        knobs = {key: value for key, value in knobs.items() if key != layers}
        words = _shown(in_layers(listed))
        variant = words if len({*map(str, listed)}) > 1 and not several else f"{variant} of {words}"
    return f"{variant} ({words})" if (words := _in_words(knobs)) else variant


def _decided_by_impl(frame: pd.DataFrame) -> pd.Series[bool]:
    """Whether a row's variant, with its parameters, has rows that differ in their implementation alone."""
    known = frame["impl"].where(frame["impl"] != UNKNOWN)
    owner = [frame["variant"], frame["params_json"]]
    differ = known.groupby(owner).transform("nunique") > 1
    if not differ.any():
        return differ
    others = [frame.loc[differ, key] for key in CONFIGURATION if key != "impl"]
    clash = known[differ].groupby(others, dropna=False).transform("nunique") > 1
    return clash.reindex(frame.index, fill_value=False).groupby(owner).transform("any")


def slot_names(names: Iterable[str], params: Iterable[str | None]) -> list[str]:
    """Each row's entry of a slot, with those of its knobs (JSON, or null) that differ among the entry's rows:
    'mlp (mult=8)'."""
    rows = list(names)
    knobs = [{} if pd.isna(text) else json.loads(text) for text in params]
    words = map(_in_words, _differing(rows, knobs))
    return [f"{name} ({own})" if own else str(name) for name, own in zip(rows, words, strict=True)]


def _differing(names: Iterable[str], knobs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row, those of its knobs that differ among the rows of its name, by name."""
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
    return [{key: own[key] for key in apart.get(name, ()) if key in own} for name, own in rows]


def _in_words(knobs: dict[str, Any]) -> str:
    """Knobs as names have them: 'n_pairs=4, n_queries=2'."""
    return _shown(", ".join(f"{_shown(key)}={_shown(spoken(own))}" for key, own in knobs.items()), MOST_KNOBS)


def in_layers(layers: Iterable[object]) -> str:
    """The layers of a mixture, from the lowest on: '3×longformer (window=64) + dense'."""
    return " + ".join(
        f"{times}×{layer}" if times > 1 else layer
        for times, layer in _runs(str(layer).replace("(", " (", 1) for layer in layers)
    )


def spoken(value: object) -> str:
    """A parameter's value without the quotes JSON would put round a word; equal words of a list are counted:
    [3xlongformer(window=64),dense]."""
    if isinstance(value, list) and value and all(isinstance(word, str) for word in value):
        return f"[{','.join(f'{times}x{word}' if times > 1 else word for times, word in _runs(value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _runs(words: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Equal neighbours once, with their number."""
    return ((len(list(same)), word) for word, same in groupby(words))
