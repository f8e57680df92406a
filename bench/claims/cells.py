"""Cells of a frame, found by their keys, and their figures over replicates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bench.claims.base import Missing
from bench.report.data.collect import spoken
from bench.report.data.intervals import interval
from bench.report.text import units


def finished(frame: pd.DataFrame, *, knobs: Mapping[str, Any] | None = None, **keys: Any) -> pd.DataFrame:
    """The finished cells that have these values in these columns, and in the knobs of their variant.

    Of a tuple, list or set any value will do; None is a figure that was not taken. Raises Missing where no
    cell is left, with the reason where there are such cells and none finished.
    """
    columns = {name: frame[name] for name in keys}
    for name in knobs or {}:
        columns[name] = frame["variant_params"].map(lambda own, name=name: own.get(name))
    asked = {**keys, **(knobs or {})}
    fits = np.ones(len(frame), dtype=bool)
    for name, column in columns.items():
        fits &= _among(column, asked[name]).to_numpy(dtype=bool)
    found = frame[fits]
    ok = found[found["status"] == "ok"]
    if ok.empty:
        raise Missing(f"{_words(asked)}: {_why(found)}")
    return ok


def _among(column: pd.Series[Any], wanted: Any) -> pd.Series[bool]:
    """Where a column has the value, or one of the values."""
    if wanted is None:
        return column.isna()
    several = isinstance(wanted, Collection) and not isinstance(wanted, str)
    return column.isin(list(wanted) if several else [wanted])


def _words(asked: Mapping[str, Any]) -> str:
    """What was asked for, as on the command line: 'variant=dense seq_len=512'."""
    return " ".join(
        f"{name}={spoken(list(value) if isinstance(value, tuple | set | frozenset) else value)}"
        for name, value in asked.items()
    )


def _why(found: pd.DataFrame) -> str:
    if found.empty:
        return "no such cell"
    status, reason = found.iloc[0][["status", "reason"]]
    return f"{status}" + (f" ({reason})" if reason else "")


def has(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """The rows that have all of these figures. Raises Missing where none has."""
    found = rows.dropna(subset=list(names))
    if found.empty:
        raise Missing(f"no {' or '.join(names)} in {len(rows)} cells, such as {rows.iloc[0]['cell_id']}")
    return found


def figure(rows: pd.DataFrame, name: str) -> float:
    """The median of a figure. Raises Missing where no row has it."""
    return float(has(rows, name)[name].median())


@dataclass(frozen=True)
class Spread:
    """A figure over replicates: its median, its 95 % interval (of two their range, of one NaN), how many."""

    middle: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: pd.Series[float]) -> Spread:
        """Of positive figures, one a replicate; the interval is that of `bench.report.data.intervals`."""
        figures = values.to_numpy(dtype=float)
        low, high = (float(np.exp(end)) for end in interval(np.log(figures)))
        return cls(float(np.median(figures)), low, high, len(figures))

    @classmethod
    def plain(cls, values: pd.Series[float]) -> Spread:
        """The same of figures that may be negative, such as differences: no logarithms are taken."""
        figures = np.asarray(values, dtype=np.float64)
        low, high = (float(end) for end in interval(figures))
        return cls(float(np.median(figures)), low, high, len(figures))

    def judged(self) -> Spread:
        """Itself, where a verdict may rest on its interval. Raises Missing of one replicate."""
        if self.count < 2:
            raise Missing(
                f"{self.count} replicate of the cells that are compared; a verdict takes two or more"
            )
        return self

    def said(self, show: Callable[[float], str]) -> str:
        """'1.32× (1.28× to 1.36×, 3 replicates)'."""
        if self.count < 2:
            return f"{show(self.middle)} (1 replicate)"
        return f"{show(self.middle)} ({show(self.low)} to {show(self.high)}, {self.count} replicates)"


def by_replicate(rows: pd.DataFrame, name: str) -> pd.Series[float]:
    """A figure of each replicate; of several cells of one replicate, their median. Raises Missing."""
    return has(rows, name).groupby("replicate")[name].median()


def ratio(rows: pd.DataFrame, base: pd.DataFrame, name: str) -> Spread:
    """A figure over that of `base`, within each replicate that both have. Raises Missing where none has."""
    return Spread.of(_paired(rows, base, name, lambda own, other: own / other))


def difference(rows: pd.DataFrame, base: pd.DataFrame, name: str) -> Spread:
    """A figure less that of `base`, within each replicate that both have. Raises Missing where none has."""
    return Spread.plain(_paired(rows, base, name, lambda own, other: own - other))


def _paired(
    rows: pd.DataFrame, base: pd.DataFrame, name: str, of: Callable[[Any, Any], pd.Series[float]]
) -> pd.Series[float]:
    found = of(by_replicate(rows, name), by_replicate(base, name)).dropna()
    if found.empty:
        raise Missing(f"{name}: no replicate has both {_label(rows)} and {_label(base)}")
    return found


def disturbed(*cells: pd.DataFrame) -> str:
    """' (3 of 12 cells were timed while something else ran)'; nothing where none was."""
    spoilt = sum(int(own["contaminated"].count()) for own in cells)
    every = sum(len(own) for own in cells)
    return f" ({spoilt} of {every} cells were timed while something else ran)" if spoilt else ""


def _label(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['label']} T={first['seq_len']} depth={first['depth']} {first['activations']}"


def large(value: float) -> str:
    """A count in words: '201 million', '51.5 billion'."""
    return units.scaled(value, (("billion", 1e9), ("million", 1e6), ("thousand", 1e3), ("", 1.0)))


def growth(sizes: tuple[float, float, float], values: tuple[float, float, float]) -> float:
    """The exponent p of a + b·sizeᵖ through three points, whose sizes grow by equal factors.

    What does not grow, a, takes no part in it. NaN where the values do not rise, or not both times.
    """
    first, second = values[1] - values[0], values[2] - values[1]
    assert math.isclose(sizes[1] / sizes[0], sizes[2] / sizes[1])
    return math.log(second / first) / math.log(sizes[1] / sizes[0]) if min(first, second) > 0 else math.nan
