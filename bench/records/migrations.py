"""Versions of the record schema, and the migration of older files.

A change needs a new version if a reader would otherwise misinterpret a file: a key is renamed or removed, its
unit or meaning changes, or it becomes required, for example because its absence stood for a value. A new key
that is null when its figure was not taken needs no new version, because a file without the key means null.
Therefore a file with unknown keys was written by a later version of the program and is not read, whatever its
schema version. A new key must not change the meaning of another one.

A migration is a pure function from the keys of one version to those of the next. `SCHEMA_VERSION` is the
current version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Keys = dict[str, Any]


def _from_1(keys: Keys) -> Keys:
    """`ff_chunks` and `twin` were added to version 1 while it was current. A file without them had an
    undivided feed-forward layer and no repeated measurement. From version 2 on both are required."""
    return {"ff_chunks": 1, "twin": 0} | keys


def _from_2(keys: Keys) -> Keys:
    """In version 2 every model was a stack of blocks with an MLP, and the file did not say so. The width of
    the MLP was a knob that files did not contain, so `feed_forward_params` stays null."""
    return {"feed_forward": "mlp", "stack": "stack", "stack_params": {}} | keys


def _from_3(keys: Keys) -> Keys:
    """In version 3 `step_precision` was called `sampling_half_width`."""
    kept = {key: value for key, value in keys.items() if key != "sampling_half_width"}
    return kept | {"step_precision": keys.get("sampling_half_width")}


MIGRATIONS: Mapping[int, Callable[[Keys], Keys]] = MappingProxyType({1: _from_1, 2: _from_2, 3: _from_3})
"""Source version → migration to the next version."""

SCHEMA_VERSION = max(MIGRATIONS) + 1


def migrate(keys: Keys) -> Keys:
    """Return the keys in the current version. Raises ValueError for an unknown version."""
    version = keys["schema_version"]
    if type(version) is not int or not min(MIGRATIONS) <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"schema_version {version!r:.50}; this program reads {min(MIGRATIONS)} to {SCHEMA_VERSION}"
        )
    for before in range(version, SCHEMA_VERSION):
        keys = MIGRATIONS[before](keys) | {"schema_version": before + 1}
    return keys
