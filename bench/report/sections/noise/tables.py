"""The machine's noise in the words of the report's head, and by length as a table."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.sections.noise.data import SUGGESTED
from bench.report.text import units
from bench.report.text.columns import Column, each

METHODS = {"percentile": "95th percentile of the pairs", "model": "model of round and cell", "": ""}


def facts(noise: pd.DataFrame) -> dict[str, str]:
    """Lines of the head, by name; takes `data.summary`."""
    lines: dict[str, list[str]] = {
        "noise floor": [],
        "A/A called different": [],
        "slowdowns found": [],
        "sampling": [],
    }
    for _, row in noise.iterrows():
        of = f"{row['machine']}: " if len(noise) > 1 else ""
        phrases = (_floor(row), _called(row), _found(row), _sampling(row))
        for name, phrase in zip(lines, phrases, strict=True):
            lines[name] += [of + phrase] if phrase else []
    return {name: "; ".join(phrases) for name, phrases in lines.items() if phrases}


def lengths(noise: pd.DataFrame) -> list[Column]:
    """A row a machine and length; takes `data.by_length`."""
    rows = [row for _, row in noise.iterrows()]
    several = noise["machine"].nunique() > 1
    return [
        *([each(noise, "machine", "machine", str, right=False)] if several else []),
        each(noise, "length", "seq_len", str, optional=False),
        each(noise, "A/A pairs", "pairs", str, optional=False),
        Column("disturbed", [_disturbed(row) or units.MISSING for row in rows]),
        Column("median difference", [units.above_one(row["median"]) for row in rows]),
        Column("floor", [units.above_one(row["floor"]) for row in rows]),
        Column("at most", [units.above_one(row["upper"]) for row in rows]),
        Column("by", [METHODS[row["method"]] or units.MISSING for row in rows], right=False),
        each(noise, "measurements", "measurements", str),
        each(noise, "short of precision", "sampled_short", str),
        Column("half-width", [_widths(row) or units.MISSING for row in rows]),
    ]


def _disturbed(row: pd.Series[Any]) -> str:
    """'2 left out', or that there are no others."""
    if row["contaminated"]:
        return "all"
    return f"{row['left_out']} left out" if row["left_out"] else ""


def _widths(row: pd.Series[Any]) -> str:
    if units.missing(row["half_width"]):
        return ""
    return f"{units.percent(row['half_width'])}, up to {units.percent(row['half_width_largest'])}"


def _floor(row: pd.Series[Any]) -> str:
    if not row["method"]:
        return "unknown, no A/A cells"
    pairs = f"{row['pairs']} A/A pair{'s' if row['pairs'] > 1 else ''}"
    if row["contaminated"]:
        pairs += ", all of them contaminated"
    elif row["left_out"]:
        pairs += f" without {row['left_out']} contaminated"
    return (
        f"{units.above_one(row['floor'])}, at most {units.above_one(row['upper'])} with 95 % confidence "
        f"({METHODS[row['method']]}, {pairs}; half of them are within {units.above_one(row['median'])}); "
        "differences are compared with the latter"
    )


def _called(row: pd.Series[Any]) -> str:
    if not row["pairs"]:
        return ""
    if not row["judged"]:
        return "unknown, too few replicates or cells"
    return f"{row['called']} of {row['judged']} ({units.percent(row['called'] / row['judged'])})"


def _found(row: pd.Series[Any]) -> str:
    """With the replicates there are and with as many as are suggested, where those are more."""
    if not row["method"]:
        return ""
    with_n = {int(row["replicates"]): row["found"]}
    if row["replicates"] < SUGGESTED:
        with_n[SUGGESTED] = row["found_suggested"]
    phrases = [f"with {n} replicates from {units.above_one(ratio)}" for n, ratio in with_n.items() if n > 1]
    family = f", among {row['comparisons']} comparisons" if row["comparisons"] > 1 else ""
    return f"{', '.join(phrases)} (in 95 % of repeats, resampled from these pairs{family})"


def _sampling(row: pd.Series[Any]) -> str:
    """How many measurements did not reach `measure.precision`."""
    if not row["measurements"]:
        return ""
    words = f"{row['sampled_short']} of {row['measurements']} measurements ended on their budget, short of "
    widths = _widths(row)
    return (
        words + "measure.precision" + (f" (half-width of the median's interval: {widths})" if widths else "")
    )
