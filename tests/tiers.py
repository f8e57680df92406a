"""Two tiers of one test: a short one that `make test` runs, and the rest of its cases in `make test-slow`.

What a change touched runs in both tiers in `.ci/run` (see touched.py).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cache
from typing import Any

import pytest

import variants
from variants.base import Variant

REPRESENTATIVES = ("dense", "longformer", "routing", "linformer", "performer", "transformer_xl")
"""A variant of each family: the short tier of tests that take a second or more for each variant."""


def slow(*cases: Any) -> list[Any]:
    """Cases of the long tier. A tuple holds one value for each argument, as in `parametrize`."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]


def representative(names: Iterable[str]) -> list[Any]:
    """Names of variants, of which only the `REPRESENTATIVES` are of the short tier."""
    return [name if name in REPRESENTATIVES else slow(name)[0] for name in names]


def tiered(cases: Iterable[tuple[Hashable, Any]]) -> list[Any]:
    """Parameter sets from (group, `pytest.param`) pairs: the first of each group is of the short tier.

    A case whose group is None is of the long tier in any event.
    """
    found, seen = [], {None}
    for group, case in cases:
        if group in seen:
            case = pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
        seen.add(group)
        found.append(case)
    return found


@cache
def _names() -> frozenset[str]:
    return frozenset(variants.names())


def variants_of(arguments: Iterable[Any]) -> set[str]:
    """The variants that arguments of a test stand for: by name, by class, or by an object with the name."""
    names = _names()
    found = set()
    for argument in arguments:
        name = getattr(argument, "name", argument)
        if isinstance(argument, type) and issubclass(argument, Variant):
            found |= {name for name in names if variants.load(name) is argument}
        elif isinstance(name, str) and name in names:
            found.add(name)
    return found
