"""Holm's correction against its definition, and the errors of whole families."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.report.data.holm import holm

LEVEL = 0.05


def rejected(p_values: list[float]) -> set[int]:
    """The procedure as the paper words it: from the smallest on, until one is above α ÷ (those left)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found: set[int] = set()
    for step, place in enumerate(order):
        if p_values[place] > LEVEL / (len(order) - step):
            break
        found.add(place)
    return found


@given(st.lists(st.floats(0, 1), max_size=12))
def test_it_rejects_what_the_stepwise_procedure_rejects(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    near = np.abs(adjusted - LEVEL) < 1e-12  # on the border rounding decides
    assert {i for i in rejected(p_values) if not near[i]} == {
        i for i in np.flatnonzero(adjusted <= LEVEL) if not near[i]
    }
    assert (adjusted >= np.array(p_values) - 1e-15).all()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_order_does_not_matter(p_values: list[float]) -> None:
    order = np.random.default_rng(len(p_values)).permutation(len(p_values))
    assert holm(np.array(p_values)[order]) == pytest.approx(holm(p_values)[order])


def test_what_was_not_compared_does_not_count() -> None:
    assert holm([0.01, np.nan, 0.04]) == pytest.approx([0.02, np.nan, 0.04], nan_ok=True)
    assert holm([]).size == 0


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_one_family_in_twenty_has_a_false_call(shared: float) -> None:
    """Twenty comparisons without any difference; `shared` is the correlation by a common reference."""
    rng = np.random.default_rng(1)
    noise = np.sqrt(1 - shared) * rng.normal(size=(2000, 20)) + np.sqrt(shared) * rng.normal(size=(2000, 1))

    p_values = 2 * stats.norm.sf(np.abs(noise))
    share = np.mean([(holm(row) <= LEVEL).any() for row in p_values])
    assert share <= 0.06
    assert np.mean((p_values <= LEVEL).any(axis=1)) > 0.1


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_only_probabilities_are_allowed(value: float) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        holm([0.5, value])
