"""An accelerator is given few launches a layer, however long the sequence.

Below some hundred launches a layer the host keeps up with an accelerator; above, a step takes the host's time
whatever the variant computes. A mark says what a variant launches that is over a ceiling today; mending the
variant turns its test red until the mark is removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

import variants
from bench.tools.launches import accelerator_spec, launches_a_layer, plan

SHORT, LONG, LONGEST = 4096, 16384, 65536
A_DOUBLING = 8
"""Launches that a layer may add where the length doubles: a step more of a tree, forward and backward."""
CEILING = 300
"""Launches a layer at the longest length."""
GROWING = {
    "compressive": (2532, 10260),
    "performer": (423, 447),
    "transformer_xl": (2096, 8432),
}
"""Variant → launches a layer at the short and the long length."""
ABOVE = {
    "compressive": 41172,
    "performer": 1305,
    "routing": 499,
    "sparse_fixed": 610,
    "sparse_strided": 492,
    "transformer_xl": 33776,
}
"""Variant → launches a layer at the longest length."""
FIRST = ("dense", "longformer", "routing")
"""Variants of the short tier."""


@cache
def launches(name: str, seq_len: int) -> int:
    return launches_a_layer(plan(accelerator_spec(name, seq_len, depth=2)))


def cases(over: Mapping[str, object]) -> list[Any]:
    """All variants; those over the ceiling must fail."""
    found = []
    for name in variants.mixers():
        marks: list[pytest.MarkDecorator] = [] if name in FIRST else [pytest.mark.slow]
        if name in over:
            marks.append(pytest.mark.xfail(strict=True, reason=f"launches a layer: {over[name]}"))
        found.append(pytest.param(name, marks=marks))
    return found


@pytest.mark.parametrize("name", cases(GROWING))
def test_launches_grow_with_the_logarithm_of_the_length_at_most(name: str) -> None:
    allowed = A_DOUBLING * math.log2(LONG / SHORT)
    assert launches(name, LONG) <= launches(name, SHORT) + allowed


@pytest.mark.parametrize("name", cases(ABOVE))
def test_a_layer_stays_below_the_ceiling(name: str) -> None:
    assert launches(name, LONGEST) <= CEILING
