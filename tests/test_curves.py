"""Curves: short whatever the length of the training, nothing left out, and the same when resumed."""

from __future__ import annotations

import csv
import io
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.train.loss_curve import COLUMNS, MAX_ROWS, Curve, Row


def row(step: int) -> Row:
    return Row(step, step / 8, 1e-3 / step, 5 + math.sin(step))


def curve_of(steps: int, curve: Curve | None = None) -> Curve:
    """A curve after these steps; `curve` is one to go on with."""
    curve = curve or Curve()
    done = (curve.last or curve.rows[-1]).step if curve.rows or curve.last else 0
    for step in range(done + 1, steps + 1):
        curve.add(row(step))
    return curve


def read(text: str) -> list[dict[str, float]]:
    return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(io.StringIO(text))]


@settings(deadline=None, max_examples=30)
@given(st.one_of(st.integers(1, 20), st.integers(1, 10 * MAX_ROWS)))
def test_a_curve_is_short_and_leaves_no_step_out(steps: int) -> None:
    """The rows, weighted by the steps they cover, have the mean of all steps."""
    rows = read(curve_of(steps).csv(step_tokens=3))
    assert len(rows) <= MAX_ROWS
    assert len(rows) > min(steps, MAX_ROWS) / 2 - 1
    assert rows[-1]["step"] == steps
    assert rows[-1]["learning_rate"] == row(steps).learning_rate
    ends = [0, *(r["step"] for r in rows)]
    covered = [after - before for before, after in pairwise(ends)]
    assert all(n == covered[0] for n in covered[:-1])
    assert 0 < covered[-1] <= covered[0]
    total = sum(r["nll"] * n for r, n in zip(rows, covered, strict=True))
    assert total == pytest.approx(sum(row(step).nll for step in range(1, steps + 1)))


def test_a_short_curve_has_a_row_a_step() -> None:
    text = curve_of(MAX_ROWS).csv(step_tokens=3)
    assert text.splitlines()[0] == ",".join(COLUMNS)
    want = [dict(zip(COLUMNS, (r.step, 3 * r.step, *r[1:]), strict=True)) for r in map(row, range(1, 1001))]
    assert read(text) == want


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5 * MAX_ROWS), st.integers(0, 5 * MAX_ROWS))
def test_a_curve_that_was_put_away_goes_on_as_if_it_had_not_been(before: int, after: int) -> None:
    again = Curve()
    again.load_state_dict(curve_of(before).state_dict())
    assert curve_of(before + after, again).csv(1) == curve_of(before + after).csv(1)
