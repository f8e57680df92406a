"""The knobs of what a configuration chooses by name: those of a variant, of a task."""

from __future__ import annotations

from functools import cache

import variants
from bench import tasks
from variants.declarations import Declared

CHOSEN = ("variant", "data")
"""Groups whose knobs depend on the chosen entry."""


@cache
def declared(group: str, name: str) -> Declared | None:
    """The knobs of the variant or task of this name; None if there is none or it cannot be imported.

    They are read from the sources, without torch, unless those are not written in literals.
    """
    if group == "data":
        return tasks.declared(name)
    if name not in variants.names():
        return None
    try:
        return variants.declared(name)
    except variants.BrokenVariant:  # for its cell to report
        return None
