"""From the text of a file to a record, or one line that says why it is none.

A record is data from elsewhere: another program, another machine, a disk that ran full. What is taken in is
what the rest of the code may rely on: the keys there are and no others, each of its type, numbers that are
finite and within the key's bounds, text that can be written out again, and an id that is no more than a
file's name.
"""

from __future__ import annotations

import json
import re
import types
import typing
from typing import Any

from bench.inputs.printable import printable
from bench.records.bounds import MOST, WHOLE, Bounds
from bench.records.migrations import migrate
from bench.records.record import KEYS, REQUIRED, STATUSES, Record

SUFFIX = ".json"
MOST_BYTES = 64 * 2**20
"""What no record comes near; a larger file is not read."""
MOST_DEEP = 16
"""How far knobs may be nested."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_KNOWN = frozenset(KEYS)
_NUMBERS = frozenset({int, float})
_KNOB = {int: Bounds(-WHOLE, WHOLE), float: Bounds(-MOST, MOST)}
"""What a number among the knobs may be."""


class RecordError(ValueError):
    """A file that is not a record this version can read; the message names it, in one line."""


def _types(hint: Any) -> frozenset[type]:
    """The types that a value read from JSON may have; int serves as float."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return frozenset().union(*map(_types, typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return frozenset({str})
    return _NUMBERS if hint is float else frozenset({typing.get_origin(hint) or hint})


_HINTS = typing.get_type_hints(Record)
_TYPES = {key: _types(hint) for key, hint in _HINTS.items()}
_KNOBS = [key for key, allowed in _TYPES.items() if dict in allowed]


def _bounds(hint: Any) -> Bounds | None:
    """The bounds in a key's hint, which are those of each element where it is a list."""
    own = (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Bounds))
    inner = (found for part in typing.get_args(hint) if (found := _bounds(part)))
    return next(own, None) or next(inner, None)


_ANNOTATED = typing.get_type_hints(Record, include_extras=True)
_BOUNDS = {key: found for key, hint in _ANNOTATED.items() if (found := _bounds(hint))}
_LISTS = {key: found for key, found in _BOUNDS.items() if list in _TYPES[key]}
_FIGURES = {key: found for key, found in _BOUNDS.items() if key not in _LISTS}


def parse(text: str, source: str = "record") -> Record:
    """A record from its JSON, of the present version or an older one.

    Raises RecordError, with `source` in its message, for whatever else the text is.
    """
    try:
        return _record(_object(text))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{printable(source)}: {printable(error, 300)}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_constant)
    except json.JSONDecodeError as error:
        cut = "" if text.rstrip().endswith("}") else ", it is empty or cut short"
        raise ValueError(f"not JSON{cut} ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON as records are written ({error})") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise ValueError("not a record (no schema_version)")
    if "\\u" in text and not _encodable(data):
        key, value = next((k, v) for k, v in data.items() if not _encodable({k: v}))
        shown = f"{printable(key, 40)}={printable(json.dumps(value), 120)}"
        raise ValueError(f"{shown}: text with half a character (a lone surrogate)")
    return data


def _encodable(data: dict[str, Any]) -> bool:
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r:.100} is there twice")
    return found


def _constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _record(data: dict[str, Any]) -> Record:
    data = migrate(data)
    if unknown := sorted(data.keys() - _KNOWN):
        raise ValueError(f"unknown keys {', '.join(unknown[:10])}; a later program may have written it")
    if missing := sorted(REQUIRED - data.keys()):
        raise ValueError(f"without {', '.join(missing)}")
    if wrong := [key for key, value in data.items() if type(value) not in _TYPES[key]]:
        raise ValueError(f"wrong type in {', '.join(wrong)}")
    if data["status"] not in STATUSES:
        raise ValueError(f"status {data['status']!r:.100} is none of {', '.join(STATUSES)}")
    if not _ID.fullmatch(data["cell_id"]):
        raise ValueError(f"cell_id {data['cell_id']!r:.200} is no name of a file")
    _check_numbers(data)
    for key in _KNOBS:
        _check_knobs(data.get(key), key, MOST_DEEP)
    return Record(**data)


def _check_numbers(data: dict[str, Any]) -> None:
    for key, bounds in _FIGURES.items():
        value = data.get(key)
        if value is None or bounds.least <= value <= bounds.most:
            continue
        if not bounds.hold(value):
            raise ValueError(_beyond(key, value, bounds))
    for key, bounds in _LISTS.items():
        values = [value for value in data.get(key) or () if value is not None]  # null: it was not finite
        if not values:
            continue
        if not set(map(type, values)) <= _NUMBERS:
            raise ValueError(f"wrong type in {key}, a list of numbers")
        for value in (min(values), max(values)):
            if not bounds.hold(value):
                raise ValueError(_beyond(key, value, bounds))


def _check_knobs(value: Any, name: str, levels: int) -> None:
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"{name}: nested more than {MOST_DEEP} deep")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_knobs(inner, f"{name}.{key}", levels - 1)
    elif type(value) in _NUMBERS and not _KNOB[type(value)].hold(value):
        raise ValueError(_beyond(name, value, _KNOB[type(value)]))


def _beyond(name: str, value: float, bounds: Bounds) -> str:
    return f"{name:.100}={value!r:.50}: allowed is {bounds}"
