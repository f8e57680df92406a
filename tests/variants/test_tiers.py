"""The short tier covers every variant: what runs by default is not only what is slow for one of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiers import REPRESENTATIVES, slow, tiered, variants_of

import variants

COSTLY = ("test_contract_compile::", "test_contract_cost::", "test_contract_device::test_a_plan")
"""Beginnings of the names of tests that take a second or more for each variant."""


def contract_tests() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every test of this folder that has cases, but for those that are slow as a whole."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name, test in inspect.getmembers(importlib.import_module(path.stem), inspect.isfunction):
            marks = [mark.name for mark in getattr(test, "pytestmark", [])]
            if name.startswith("test_") and "parametrize" in marks and "slow" not in marks:
                yield f"{path.stem}::{name}", test


def without_short_case(test: Callable[..., Any]) -> set[str]:
    """Variants of which all cases are slow, and arguments without a case that is not."""
    missing = set()
    for mark in (mark for mark in test.pytestmark if mark.name == "parametrize"):  # type: ignore[attr-defined]
        names, cases = mark.args[:2]
        every, short = set(), set()
        shorts = 0
        for case in cases:
            is_set = isinstance(case, type(pytest.param()))
            values = case.values if is_set else case if isinstance(case, tuple) else (case,)
            found = variants_of(values)
            every |= found
            if not (is_set and any(m.name == "slow" for m in case.marks)):
                short |= found
                shorts += 1
        missing |= every - short if shorts else {str(names)}
    return missing


def test_every_contract_test_has_a_short_case_of_every_variant() -> None:
    """Those that compile or plan whole models have a variant of each family."""
    found = {name: without_short_case(test) for name, test in contract_tests()}
    assert len(found) > 100
    others = {*variants.names()} - {*REPRESENTATIVES}
    for name in found:
        if name.startswith(COSTLY):
            assert found[name] <= others
            found[name] = set()
    assert {name: missing for name, missing in found.items() if missing} == {}


def test_a_missing_short_case_is_seen() -> None:
    @pytest.mark.parametrize("tokens", slow(1, 2))
    @pytest.mark.parametrize("name", ["dense", *slow("longformer")])
    def test(name: str, tokens: int) -> None: ...

    assert without_short_case(test) == {"longformer", "tokens"}


def test_the_first_of_a_group_is_short() -> None:
    groups = ["a", "a", None, "b"]
    found = tiered((group, pytest.param(place)) for place, group in enumerate(groups))
    assert [case.values for case in found] == [(0,), (1,), (2,), (3,)]
    assert [[mark.name for mark in case.marks] for case in found] == [[], ["slow"], ["slow"], []]
