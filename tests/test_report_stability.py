"""Kendall's τ between replicates and budgets, and loss curves that must predict the largest budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_parts import part_of
from test_report import record, table

from bench.records import Record
from bench.records.configurations import table as frame_of_records
from bench.report.data.collect import relabelled
from bench.report.data.loss_fit import FASTEST, FEWEST, SLOWEST, fit
from bench.report.data.statistics import quality_cells
from bench.report.sections.stability.data import curves, orders, with_budgets

BUDGETS = [1_000_000, 2_000_000, 4_000_000, 8_000_000]


def run(variant: str, replicate: int, by_budget: list[float], **other: Any) -> Record:
    """A run whose last budget is its whole training."""
    sizes = BUDGETS[: len(by_budget)]
    values = {
        "cell_id": f"{variant}-{replicate}",
        "variant_params": {},
        "tokens_trained": sizes[-1],
        "train_budgets": sizes,
        "nll_by_budget": by_budget,
        "nll": by_budget[-1],
    }
    return record(variant, replicate=replicate, **{**values, **other})


@settings(deadline=None, max_examples=40)
@given(st.floats(0, 3), st.floats(0.1, 3), st.floats(0.05, 2), st.integers(FEWEST, 7))
def test_a_curve_of_the_form_is_predicted_exactly(
    floor: float, scale: float, exponent: float, count: int
) -> None:
    sizes = 1e6 * 2.0 ** np.arange(count)
    found = fit(list(sizes), [floor + scale * (size / 1e6) ** -exponent for size in sizes])
    assert found is not None
    assert found.predicted == pytest.approx(floor + scale * (sizes[-1] / 1e6) ** -exponent, abs=1e-4)
    assert found.exponent == pytest.approx(exponent, rel=0.02)


def test_the_largest_budget_takes_no_part_in_its_prediction() -> None:
    values = [3.0, 2.5, 2.2]
    first, second = (fit([*BUDGETS], [*values, last]) for last in (2.0, 9.0))
    assert first is not None
    assert first == second
    # Three points a factor of 2 apart: each step is 2^−α of the one before.
    assert first.exponent == pytest.approx(math.log2(0.5 / 0.3), rel=1e-3)
    assert first.predicted == pytest.approx(2.2 - 0.3 * 0.6, abs=1e-3)


def test_a_curve_that_bends_the_other_way_ends_at_a_bound() -> None:
    falling_faster = fit([*BUDGETS], [3.0, 2.9, 2.5, 1.5])
    assert falling_faster is not None
    assert falling_faster.at_bound
    assert SLOWEST <= falling_faster.exponent <= FASTEST


@pytest.mark.parametrize("values", [[3.0, 2.5], [3.0, 2.5, 2.2], [3.0, 2.5, math.nan, 2.1]])
def test_there_is_no_fit_of_fewer_budgets_or_of_no_number(values: list[float]) -> None:
    assert fit(BUDGETS[: len(values)], values) is None


def pool(orders_of: dict[str, list[list[float]]]) -> list[Record]:
    return [
        run(variant, replicate, by_budget)
        for variant, of_replicates in orders_of.items()
        for replicate, by_budget in enumerate(of_replicates)
    ]


def test_tau_is_1_for_the_same_order_and_less_by_each_exchange() -> None:
    """Three replicates of three models. At the end one replicate exchanges two neighbours, which is worth
    2 / 3; after the first budget the order of the means is the reverse."""
    found = pool(
        {
            "dense": [[3.0, 1.0], [3.0, 1.0], [3.0, 1.0]],
            "chunked": [[2.0, 2.0], [2.0, 2.0], [2.0, 2.8]],
            "performer": [[1.0, 2.5], [1.0, 2.5], [1.0, 2.5]],
        }
    )
    frame = relabelled(frame_of_records(found))
    (row,) = orders(with_budgets(frame), quality_cells(frame)).to_dict("records")
    assert (row["models"], row["replicates"]) == (3, 3)
    assert row["tau_replicates"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert row["tau_budgets"] == [(1e6, pytest.approx(-1.0))]


def test_what_sees_the_future_takes_no_part_in_an_order() -> None:
    found = pool({"dense": [[3.0, 1.0]] * 2, "chunked": [[2.0, 2.0]] * 2, "performer": [[1.0, 0.1]] * 2})
    for one in found:
        one.leak_max_abs = 0.7 if one.variant == "performer" else 0.0
    frame = relabelled(frame_of_records(found))
    (row,) = orders(with_budgets(frame), quality_cells(frame)).to_dict("records")
    assert row["models"] == 2


def test_curves_are_in_bits_per_byte_and_of_means() -> None:
    values = [[3.0, 2.5, 2.2, 2.0], [3.2, 2.7, 2.4, 2.2]]
    frame = relabelled(frame_of_records(pool({"dense": values})))
    (row,) = curves(with_budgets(frame)).to_dict("records")
    assert row["came"] == pytest.approx(2.1 / math.log(2))
    assert row["predicted"] == pytest.approx((2.3 - 0.3 * 0.6) / math.log(2), abs=2e-3)
    assert row["spread"] == pytest.approx(0.2 / math.sqrt(2) / math.log(2))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_report_shows_the_prediction_beside_what_came(tmp_path: Path, count: int) -> None:
    values = [3.0, 2.5, 2.2, 2.0][:count]
    found = pool({"dense": [values] * 2, "chunked": [[value + 0.1 for value in values]] * 2})
    text = part_of(tmp_path / "e", found, "stability").text
    (order,) = table(text, "## Stability of the order")
    assert order["τ between replicates"] == "1.00"
    rows = table(text, "### Loss curves over budgets")
    assert [row["variant"] for row in rows] == ["chunked", "dense"]
    came = values[-1] / math.log(2)
    assert float(rows[1]["came"].partition(" ±")[0]) == pytest.approx(came, abs=6e-4)
    if count < FEWEST:
        assert {row["predicted"] for row in rows} == {f"too few budgets ({count})"}
        assert "α" not in rows[0]
    else:
        assert float(rows[1]["predicted"]) == pytest.approx((2.2 - 0.3 * 0.6) / math.log(2), abs=3e-3)


def test_runs_of_one_budget_have_an_order_and_no_curve(tmp_path: Path) -> None:
    found = [record(name, replicate=replicate) for name in ("dense", "chunked") for replicate in range(2)]
    text = part_of(tmp_path / "e", found, "stability").text
    assert "## Stability of the order" in text
    assert "Loss curves" not in text
