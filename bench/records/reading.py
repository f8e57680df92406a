"""Parsing and validation of records.

The text of a record is untrusted input: it may come from another program or machine, or be truncated by a
full disk. An accepted record satisfies what the rest of the code relies on: it has only known keys, each of
its type; numbers are finite and within the key's bounds; text can be encoded as UTF-8; and the id is a plain
file name.
"""

from __future__ import annotations

import json
import re
import types
import typing
from typing import Any

from bench.inputs.printable import printable
from bench.records.bounds import MAX_FIGURE, MAX_INT, Bounds
from bench.records.migrations import migrate
from bench.records.record import KEYS, REQUIRED, STATUSES, Record

MAX_BYTES = 64 * 2**20
"""Far above the size of any record; a larger file is not read."""
MAX_DEPTH = 16
"""Maximum nesting depth of knobs."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KNOWN = frozenset(KEYS)
_NUMBERS = frozenset({int, float})
_KNOB = {int: Bounds(-MAX_INT, MAX_INT), float: Bounds(-MAX_FIGURE, MAX_FIGURE)}
"""Bounds of numbers among the knobs, by type."""


class RecordError(ValueError):
    """A file is not a record that this version can read; the one-line message names the file."""


def _types(hint: Any) -> frozenset[type]:
    """Return the types that a value read from JSON may have; an int is accepted as a float."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return frozenset().union(*map(_types, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return frozenset({str})
    return _NUMBERS if hint is float else frozenset({typing.get_origin(hint) or hint})


_HINTS = typing.get_type_hints(Record)
_TYPES = {key: _types(hint) for key, hint in _HINTS.items()}
_KNOBS = [key for key, allowed in _TYPES.items() if dict in allowed]


def _bounds(hint: Any) -> Bounds | None:
    """Return the bounds in a key's type hint; for a list, those of its elements."""
    own = (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Bounds))
    inner = (bounds for part in typing.get_args(hint) if (bounds := _bounds(part)))
    return next(own, None) or next(inner, None)


_ANNOTATED = typing.get_type_hints(Record, include_extras=True)
_BOUNDS = {key: bounds for key, hint in _ANNOTATED.items() if (bounds := _bounds(hint))}
_LISTS = {key: bounds for key, bounds in _BOUNDS.items() if list in _TYPES[key]}
_FIGURES = {key: bounds for key, bounds in _BOUNDS.items() if key not in _LISTS}


def parse(text: str, source: str = "record") -> Record:
    """Parse a record of the current or an older version from its JSON.

    Raises RecordError, with `source` in the message, for any other text.
    """
    try:
        return _record(_object(text))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{printable(source)}: {printable(error, 300)}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        cut = "" if text.rstrip().endswith("}") else ", it is empty or truncated"
        raise ValueError(f"not JSON{cut} ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON as a record requires ({error})") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ValueError("not a record (no schema_version)")
    if "\\u" in text and not _encodable(data):
        key, value = next((k, v) for k, v in data.items() if not _encodable({k: v}))
        shown = f"{printable(key, 40)}={printable(json.dumps(value), 120)}"
        raise ValueError(f"{shown}: the text contains a lone surrogate")
    return data


def _encodable(data: dict[str, Any]) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r:.100} appears twice")
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _record(data: dict[str, Any]) -> Record:
    data = migrate(data)
    if unknown := sorted(data.keys() - _KNOWN):
        raise ValueError(f"unknown keys {', '.join(unknown[:10])}; a later version may have written it")
    if missing := sorted(REQUIRED - data.keys()):
        raise ValueError(f"missing keys {', '.join(missing)}")
    if wrong := [key for key, value in data.items() if type(value) not in _TYPES[key]]:
        raise ValueError(f"wrong type in {', '.join(wrong)}")
    if data["status"] not in STATUSES:
        raise ValueError(f"status {data['status']!r:.100} is not one of {', '.join(STATUSES)}")
    if not _ID.fullmatch(data["cell_id"]):
        raise ValueError(f"cell_id {data['cell_id']!r:.200} is not a file name")
    _check_numbers(data)
    for key in _KNOBS:
        _check_knobs(data.get(key), key, MAX_DEPTH)
    return Record(**data)


def _check_numbers(data: dict[str, Any]) -> None:
    for key, bounds in _FIGURES.items():
        value = data.get(key)
        if value is None or bounds.minimum <= value <= bounds.maximum:
            continue
        if not bounds.hold(value):
            raise ValueError(_out_of_bounds(key, value, bounds))
    for key, bounds in _LISTS.items():
        values = [value for value in data.get(key) or () if value is not None]  # null: it was not finite
        if not values:
            continue
        if not set(map(type, values)) <= _NUMBERS:
            raise ValueError(f"wrong type in {key}, a list of numbers")
        for value in (min(values), max(values)):
            if not bounds.hold(value):
                raise ValueError(_out_of_bounds(key, value, bounds))


def _check_knobs(value: Any, name: str, levels: int) -> None:
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"{name}: nested deeper than {MAX_DEPTH} levels")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_knobs(inner, f"{name}.{key}", levels - 1)
    elif type(value) in _NUMBERS and not _KNOB[type(value)].hold(value):
        raise ValueError(_out_of_bounds(name, value, _KNOB[type(value)]))


def _out_of_bounds(name: str, value: float, bounds: Bounds) -> str:
    return f"{name:.100}={value!r:.50}: allowed is {bounds}"
