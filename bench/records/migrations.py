"""Versions of the record, and how files of an older one are read.

What makes a version is what a reader would otherwise misread: a key that is renamed or dropped, whose unit
or meaning changes, or that comes to be required, such as one whose absence stands for a value. A key that
is added and null where it was not taken needs none: every file without it says null. So a file with keys
that we do not know is one of a later program, and not read, whatever its version; no key may be added that
changes what another one says.

A migration takes the keys of one version to those of the next and is pure; `SCHEMA_VERSION` is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Keys = dict[str, Any]


def _from_1(keys: Keys) -> Keys:
    """Version 1 grew `ff_chunks` and `twin` while it was current; where a file does not name them the
    feed-forward layer went in one piece, and nothing was measured twice. From version 2 on both are
    required."""
    return {"ff_chunks": 1, "twin": 0} | keys


MIGRATIONS: Mapping[int, Callable[[Keys], Keys]] = MappingProxyType({1: _from_1})
"""By the version that they lead away from; each leads to the next."""

SCHEMA_VERSION = max(MIGRATIONS) + 1


def migrate(keys: Keys) -> Keys:
    """The keys as the present version has them. Raises ValueError for a version that it cannot know."""
    version = keys["schema_version"]
    if type(version) is not int or not min(MIGRATIONS) <= version <= SCHEMA_VERSION:
        raise ValueError(
            f"schema_version {version!r:.50}; this program reads {min(MIGRATIONS)} to {SCHEMA_VERSION}"
        )
    for before in range(version, SCHEMA_VERSION):
        keys = MIGRATIONS[before](keys) | {"schema_version": before + 1}
    return keys
