"""What a model changes against the default of a run, in a few words: 'glu (activation=gelu)', 'norm=rms'."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from bench.records import Record
from bench.records.record import MODEL_OPTIONS, SLOTS, SWITCHED_ON
from bench.report.data.collect import spoken
from bench.report.data.statistics import BASELINE

DEFAULT = "default"
"""The name of the model that the others are set against."""
ENTRIES = {"variant": BASELINE, **{slot: str(getattr(Record, slot)) for slot in SLOTS}}
"""What fills each part of a model that is chosen by name, usually."""
WIDTHS = ("width", "mult")
"""Knobs of an entry that make models equally large. A name has them only where nothing else tells apart."""
WIDER = "widen_feed_forward"
"""The option that does the same."""

PARTS = ("attention", "feed-forward", "depth schedule", "norms, heads, embeddings")
"""What a modification changes: the parts of `ENTRIES`, then the options of the model."""

Configuration = Mapping[str, Any]
"""A model without its sizes: the entry of each of `ENTRIES`, its knobs that are not null by dotted names, and
the options of the model."""


def configurations(frame: pd.DataFrame) -> list[str]:
    """The configuration of each record, as JSON."""
    texts: dict[tuple[Any, ...], str] = {}
    columns = ["variant", "params_json", *SLOTS, *(f"{slot}_json" for slot in SLOTS)]
    found = []
    for values in frame[[*columns, *MODEL_OPTIONS]].itertuples(index=False, name=None):
        key = tuple(None if pd.isna(value) else value for value in values)
        if key not in texts:
            texts[key] = _as_json(dict(zip([*columns, *MODEL_OPTIONS], key, strict=True)))
        found.append(texts[key])
    return found


def _as_json(values: Mapping[str, Any]) -> str:
    found: dict[str, Any] = {key: values[key] for key in MODEL_OPTIONS}
    for entry in ENTRIES:
        text = values["params_json" if entry == "variant" else f"{entry}_json"]
        knobs = json.loads(text) if text else {}
        found[entry] = values[entry]
        found |= {f"{entry}.{knob}": value for knob, value in knobs.items() if value is not None}
    return json.dumps(found, sort_keys=True)


def slots_of(text: str) -> str:
    """A configuration without its variant, as JSON."""
    own = json.loads(text)
    return json.dumps({key: own[key] for key in own if not _is_of(key, "variant")}, sort_keys=True)


def _is_of(key: str, entry: str) -> bool:
    return key == entry or key.startswith(f"{entry}.")


def reference_of(pools: Sequence[Sequence[str]]) -> str:
    """The configuration that the others of these pools are set against.

    It is in the most pools; of several it has the fewest unusual parts, then the knobs nearest to those of
    the others, then the fewest knobs, then it was measured first. Pools are lists of configurations in the
    order of measurement.
    """
    counts = Counter(text for pool in pools for text in {*pool})
    order = {text: place for place, text in enumerate(dict.fromkeys(text for pool in pools for text in pool))}
    read = {text: json.loads(text) for text in counts}

    def key(text: str) -> tuple[int, ...]:
        apart = sum(len(_apart(read[text], other)) for other in read.values())
        return -counts[text], _unusual(read[text]), apart, len(read[text]), order[text]

    return min(counts, key=key)


def _unusual(own: Configuration) -> int:
    options = sum(own[key] != usual for key, usual in MODEL_OPTIONS.items())
    return int(options + sum(own[entry] != usual for entry, usual in ENTRIES.items()))


def _apart(own: Configuration, other: Configuration) -> list[str]:
    """The keys in which two configurations differ."""
    return [key for key in sorted({*own, *other}) if own.get(key) != other.get(key)]


def names_of(pools: Sequence[Sequence[str]], reference: str) -> dict[str, str]:
    """Configuration → its name.

    The sizes `WIDTHS` are left out, so that one modification has one name where its width differs between
    tasks; but not where two configurations of one pool would share a name.
    """
    texts = [*dict.fromkeys(text for pool in pools for text in pool)]
    read = {text: json.loads(text) for text in texts}
    short = {text: _name(read[text], read[reference], read.values(), widths=False) for text in texts}
    shared: set[str] = set()
    for pool in pools:
        counts = Counter(short[text] for text in {*pool})
        shared |= {name for name, count in counts.items() if count > 1}
    return {
        text: _name(read[text], read[reference], read.values(), widths=True)
        if short[text] in shared and text != reference
        else short[text]
        for text in texts
    }


def _name(
    own: Configuration, reference: Configuration, every: Iterable[Configuration], *, widths: bool
) -> str:
    apart = _apart(own, reference)
    if not apart:
        return DEFAULT
    sizes = [key for key in apart if key.rpartition(".")[2] in WIDTHS or key == WIDER]
    hidden = set() if widths or len(sizes) == len(apart) else {*WIDTHS}
    words = []
    for entry in ENTRIES:
        if own[entry] == reference[entry]:
            knobs = [key for key in apart if _is_of(key, entry)]
        else:  # those that differ among the models with this entry
            peers = [other for other in every if other[entry] == own[entry]]
            knobs = sorted({key for other in peers for key in _apart(own, other) if _is_of(key, entry)})
        shown = [key for key in knobs if key.rpartition(".")[2] not in hidden]
        listed = ", ".join(f"{key.rpartition('.')[2]}={spoken(own.get(key))}" for key in shown)
        if own[entry] != reference[entry]:
            words.append(f"{own[entry]} ({listed})" if listed else str(own[entry]))
        elif listed:
            words.append(listed)
    words += [
        _option(option, str(own[option]))
        for option in MODEL_OPTIONS
        if option in apart and not (option == WIDER and hidden)
    ]
    return ", ".join(words)


def _option(option: str, value: str) -> str:
    if option in SWITCHED_ON:
        return option if value == SWITCHED_ON[option] else f"{option}=false"
    return f"{option}={value}"


def part_of(text: str, reference: str) -> str:
    """The first of `PARTS` in which a configuration differs from the reference; widths and all that only
    makes models equally large come last."""
    own, other = json.loads(text), json.loads(reference)
    apart = _apart(own, other)
    telling = [key for key in apart if key.rpartition(".")[2] not in WIDTHS and key != WIDER] or apart
    for entry, part in zip(ENTRIES, PARTS, strict=False):
        if any(_is_of(key, entry) for key in telling):
            return part
    return PARTS[-1]
