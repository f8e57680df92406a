"""The knobs of entries that are chosen by name and have knobs of their own: variants, tasks and slots."""

from __future__ import annotations

from functools import cache

import variants
from bench import tasks
from variants.declarations import Declared
from variants.slots import SLOTS

CHOSEN = ("variant", "data", *SLOTS)
"""Groups in which each entry has its own knobs."""


@cache
def declared(group: str, name: str) -> Declared | None:
    """Return the knobs of an entry of one of the groups `CHOSEN`; None if there is no such entry, or if its
    module cannot be imported.

    They are read from the source, without torch, if they are written in literals.
    """
    if group == "data":
        return tasks.declared(name)
    slot = SLOTS.get(group)
    if name not in (slot.names() if slot else variants.names()):
        return None
    try:
        return slot.declared(name) if slot else variants.declared(name)
    except variants.BrokenVariant:  # the cell reports it
        return None
