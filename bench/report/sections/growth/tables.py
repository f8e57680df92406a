"""Tables of fitted exponents, one for the length and one for the depth, with the claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from bench.report.data.disturbed import DISTURBED
from bench.report.text import units
from bench.report.text.columns import Column

ABOVE, BELOW, UNLIKE = "▲", "▽", "≠"
_MARKS = {"above": ABOVE, "below": BELOW, "": ""}
Row = dict[str, "pd.Series[Any]"]
"""Figure's name → its fit; of one variant."""


def by_length(fits: pd.DataFrame) -> list[Column]:
    """A row a variant, within one group; takes the rows of `scaling.exponents` whose axis is seq_len."""
    labels, rows = _rows(fits)
    return [
        Column("variant", labels, right=False, optional=False),
        Column("lengths", [_range(row, units.length) for row in rows], optional=False),
        Column("attention FLOPs", [_exponent(row, "attention") for row in rows]),
        Column("step time", [_exponent(row, "time") for row in rows]),
        Column("claimed", [_claim(row, "attention") for row in rows]),
        Column("survey", [_survey(row) for row in rows]),
        Column("all FLOPs", [_exponent(row, "algorithmic") for row in rows]),
        Column("executed", [_exponent(row, "executed") for row in rows]),
        Column("peak memory", [_exponent(row, "memory") for row in rows]),
        Column("saved activations", [_exponent(row, "saved") for row in rows]),
        Column("claimed", [_claim(row, "memory", "saved") for row in rows]),
        Column("claim", [_source(row) for row in rows], right=False),
    ]


def by_depth(fits: pd.DataFrame) -> list[Column]:
    """A row a variant, within one setting and length; takes the rows whose axis is depth."""
    labels, rows = _rows(fits)
    return [
        Column("variant", labels, right=False, optional=False),
        Column("depths", [_range(row, units.whole) for row in rows], optional=False),
        Column("step time", [_exponent(row, "time") for row in rows]),
        Column("all FLOPs", [_exponent(row, "algorithmic") for row in rows]),
        Column("executed", [_exponent(row, "executed") for row in rows]),
        Column("peak memory", [_exponent(row, "memory") for row in rows]),
        Column("saved activations", [_exponent(row, "saved") for row in rows]),
        Column("claimed", [_claim(row, "saved") for row in rows]),
    ]


def _rows(fits: pd.DataFrame) -> tuple[list[str], list[Row]]:
    """Each variant's label and its fits by figure, in the order of the frame."""
    parts = list(fits.groupby("label", sort=False))
    rows = [{str(fit["figure"]): fit for _, fit in own.iterrows()} for _, own in parts]
    return [str(label) for label, _ in parts], rows


def _range(row: Row, show: Callable[[float], str]) -> str:
    """The sizes fitted: '1k–8k'; where figures were taken at different ones, which at which."""
    figures_by_range: dict[str, list[str]] = {}
    for name, fit in row.items():
        figures_by_range.setdefault(f"{show(fit['first'])}–{show(fit['last'])}", []).append(name)
    if len(figures_by_range) == 1:
        return next(iter(figures_by_range))
    return "; ".join(f"{', '.join(names)} {sizes}" for sizes, names in figures_by_range.items())


def _exponent(row: Row, figure: str) -> str:
    """'1.02 (0.98–1.06)', marked where it contradicts its claim; the interval where it is not a point."""
    if figure not in row:
        return units.MISSING
    fit = row[figure]
    value, low, high = (f"{fit[key]:.2f}" for key in ("exponent", "low", "high"))
    spread = "" if low == high else f" ({low}–{high})" if fit["low"] >= 0 else f" ({low} to {high})"
    return value + spread + _MARKS[fit["verdict"]] + (", disturbed" if fit[DISTURBED] else "")


def _claim(row: Row, *figures: str) -> str:
    claim = next((row[name]["claim"] for name in figures if name in row), None)
    return units.MISSING if units.missing(claim) else f"{claim:g}"


def _survey(row: Row) -> str:
    fit = row.get("attention")
    if fit is None or units.missing(fit["survey"]):
        return units.MISSING
    return f"{fit['survey']:g}" + (UNLIKE if fit["survey_verdict"] else "")


def _source(row: Row) -> str:
    source = next(iter(row.values()))["claim_source"]
    return source if isinstance(source, str) else units.MISSING
