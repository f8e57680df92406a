"""Numbers, names and looks in the report: what a reader sees."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.report.figures.style import STRATEGIES, strategy_styles
from bench.report.text import markdown, units
from bench.report.text.phrases import describe


@pytest.mark.parametrize(
    ("value", "said"),
    [(512, "512"), (1000, "1000"), (1024, "1k"), (1536, "1.5k"), (4096, "4k"), (1 << 20, "1M")],
)
def test_lengths_are_binary(value: int, said: str) -> None:
    assert units.length(value) == said


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (units.seconds(0.0123), "12.3 ms"),
        (units.seconds(0.99996), "1.00 s"),
        (units.seconds(4.2e-5), "42.0 µs"),
        (units.size(1536 * 1024), "1.50 MiB"),
        (units.size(3 * 2**30), "3.00 GiB"),
        (units.flops(1.234e12), "1.23 TFLOP"),
        (units.rate(12_345.0), "12.3 k tokens/s"),
        (units.rate(512.0), "512 tokens/s"),
        (units.ratio(0.25), "0.250×"),
        (units.between(0.0123, 0.0145, "seconds"), "12.3–14.5 ms"),
        (units.between(0.9, 1.1, "seconds"), "900 ms – 1.10 s"),
    ],
)
def test_units_are_human(said: str, expected: str) -> None:
    assert said == expected


@pytest.mark.parametrize(
    "show", [units.seconds, units.size, units.flops, units.rate, units.ratio, units.length]
)
def test_a_figure_not_taken_is_a_dash(show: object) -> None:
    assert callable(show)
    assert show(None) == show(math.nan) == "–"


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_three_digits_are_within_half_a_percent(value: float) -> None:
    said = units.digits(value).replace(",", "")
    assert float(said) == pytest.approx(value, rel=5.001e-3)
    assert "e" not in said


@given(st.text())
def test_an_escaped_cell_stays_one_cell(text: str) -> None:
    cell = markdown.escape(text)
    assert len(cell.splitlines()) <= 1
    unescaped = cell.replace("\\\\", "")
    assert "|" not in unescaped.replace("\\|", "")


def test_escape_keeps_names_readable() -> None:
    assert markdown.escape("seq_len of __init__ is a|b") == "seq_len of \\_\\_init\\_\\_ is a\\|b"


@pytest.mark.parametrize(
    ("value", "said"), [(0.05, "5.00 %"), (-0.1, "-10.0 %"), (0.0, "0 %"), (math.nan, "–"), (1.5, "150 %")]
)
def test_percent_keeps_its_sign(value: float, said: str) -> None:
    assert units.percent(value) == said


def test_strategies_keep_their_order_and_looks_whatever_stands_beside_them() -> None:
    alone = strategy_styles(["reversible", "keep"])
    assert list(alone) == ["keep", "reversible"]
    beside = strategy_styles(["zip", "reversible", *STRATEGIES, "archive"])
    assert list(beside) == [*STRATEGIES, "archive", "zip"]
    assert {name: beside[name] for name in alone} == alone
    assert len({(look.colour, look.marker) for look in beside.values()}) == len(beside)


def test_a_ratio_that_says_nothing_is_written_without_its_digits() -> None:
    assert units.above_one(1.123) == "12.3 %"
    assert units.above_one(11.0) == "1,000 %"
    assert units.above_one(12.0) == units.above_one(math.inf) == "over 1,000 %"
    assert units.above_one(math.nan) == units.MISSING


def test_one_is_singular() -> None:
    assert describe({"heads": 1, "threads": "1"}, ["heads", "threads"]) == "1 head, 1 thread"
    assert describe({"heads": 12, "threads": "2"}, ["heads", "threads"]) == "12 heads, 2 threads"
