"""Facts about variants without their modules: their `info` and family, read from the source.

Imports no torch, unless `info` is asked of a variant whose source has no literals.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import variants
from variants.declarations import Unreadable, attribute, declared
from variants.knobs import knobs_of

MIXTURE = "mixture"
"""The family of a variant whose layers are of several other variants."""
UNKNOWN = "unknown"
"""The family of a name that no variant has here, or whose source does not state one in literals."""


def info(name: str) -> dict[str, Any] | None:
    """The `info` of a variant as a dictionary; None for a mixture.

    A source without literals is imported. Raises UnknownVariant and, if the variant is imported, as
    `variants.load` does.
    """
    try:
        return _read(name)
    except Unreadable:
        variant = variants.load(name)
        return dataclasses.asdict(variant.info_for(variant.Config()))


def family(name: str) -> str:
    """The family of a variant; `MIXTURE` or `UNKNOWN` if it has none. Imports nothing and never fails."""
    try:
        found = _read(name)
    except (Unreadable, variants.UnknownVariant, variants.PluginClash):
        return UNKNOWN
    return MIXTURE if found is None else str(found.get("family", UNKNOWN))


def layers_knob(name: str) -> str | None:
    """The knob of a mixture that lists its layers, which is its only list of texts; None for other variants.

    Imports nothing and never fails.
    """
    if family(name) != MIXTURE:
        return None
    try:
        knobs = knobs_of(declared(*variants.source_of(name)).config)
    except Unreadable:
        return None
    lists = [knob for knob, one in knobs.items() if one.is_list and one.number is None]
    return lists[0] if len(lists) == 1 else None


def _read(name: str) -> dict[str, Any] | None:
    """Raises Unreadable and UnknownVariant."""
    module, owner = variants.source_of(name)
    found = attribute(module, owner, "info")
    return None if found is None else dict(found)
