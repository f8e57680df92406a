"""Selection of cells by their keys, and aggregation of their figures over replicates."""

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
    """Return the finished cells with these values in these columns and in the knobs of their variant.

    A tuple, list or set matches any of its values; None matches a figure that was not taken. Raises Missing
    if there is no such cell, or, with the reason, if no such cell finished.
    """
    columns = {name: frame[name] for name in keys}
    for name in knobs or {}:
        columns[name] = frame["variant_params"].map(lambda own, name=name: own.get(name))
    query = {**keys, **(knobs or {})}
    fits = np.ones(len(frame), dtype=bool)
    for name, column in columns.items():
        fits &= _among(column, query[name]).to_numpy(dtype=bool)
    matching = frame[fits]
    ok = matching[matching["status"] == "ok"]
    if ok.empty:
        raise Missing(f"{_words(query)}: {_why(matching)}")
    return ok


def _among(column: pd.Series[Any], value: Any) -> pd.Series[bool]:
    """Return where a column has the value, or one of the values."""
    if value is None:
        return column.isna()
    several = isinstance(value, Collection) and not isinstance(value, str)
    return column.isin(list(value) if several else [value])


def _words(query: Mapping[str, Any]) -> str:
    """Return the query as on the command line: 'variant=dense seq_len=512'."""
    return " ".join(f"{name}={spoken(_plain(value))}" for name, value in query.items())


def _plain(value: Any) -> Any:
    """Return a value as JSON can hold it: a number of a frame is one of NumPy."""
    if isinstance(value, tuple | set | frozenset):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _why(matching: pd.DataFrame) -> str:
    if matching.empty:
        return "no such cell"
    status, reason = matching.iloc[0][["status", "reason"]]
    return f"{status}" + (f" ({reason})" if reason else "")


def has(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return the rows that have all of these figures. Raises Missing if there are none."""
    known = [name for name in names if name in rows.columns]
    complete = rows.dropna(subset=known) if len(known) == len(names) else rows.iloc[:0]
    if complete.empty:
        some = f"in one of {len(rows)} cells, such as {rows.iloc[0]['cell_id']}"
        raise Missing(f"variant={rows.iloc[0]['variant']}: {' and '.join(names)} {some}")
    return complete


def figure(rows: pd.DataFrame, name: str) -> float:
    """Return the median of a figure. Raises Missing if no row has it."""
    return float(has(rows, name)[name].median())


@dataclass(frozen=True)
class Spread:
    """A figure over replicates:
    median, 95 % interval (the range for two replicates, NaN for one) and count."""

    middle: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: pd.Series[float]) -> Spread:
        """Compute the spread of positive figures, one per replicate; the interval is that of
        `bench.report.data.intervals`."""
        figures = values.to_numpy(dtype=float)
        low, high = (float(np.exp(end)) for end in interval(np.log(figures)))
        return cls(float(np.median(figures)), low, high, len(figures))

    @classmethod
    def plain(cls, values: pd.Series[float]) -> Spread:
        """Compute the spread of figures that may be negative, such as differences, without logarithms."""
        figures = np.asarray(values, dtype=np.float64)
        low, high = (float(end) for end in interval(figures))
        return cls(float(np.median(figures)), low, high, len(figures))

    def text(self, show: Callable[[float], str]) -> str:
        """Return the spread as text: '1.32× (1.28× to 1.36×, 3 replicates)'."""
        if self.count < 2:
            return f"{show(self.middle)} (1 replicate)"
        return f"{show(self.middle)} ({show(self.low)} to {show(self.high)}, {self.count} replicates)"


def step_time(*cells: pd.DataFrame) -> str:
    """Return the time by which these cells are compared: the device's if all of them have it, else wall-clock
    time, which may be that of the host."""
    device = all(own["device_seconds_step"].notna().all() for own in cells)
    return "device_seconds_step" if device else "step_seconds_median"


def by_replicate(rows: pd.DataFrame, name: str) -> pd.Series[float]:
    """Return a figure per replicate, the median if a replicate has several cells. Raises Missing."""
    return has(rows, name).groupby("replicate")[name].median()


def ratio(rows: pd.DataFrame, base: pd.DataFrame, name: str) -> Spread:
    """Return the ratio of a figure to that of `base`, paired by replicate.
    Raises Missing without common replicates."""
    return Spread.of(_paired(rows, base, name, lambda own, other: own / other))


def difference(rows: pd.DataFrame, base: pd.DataFrame, name: str) -> Spread:
    """Return the difference of a figure to that of `base`, paired by replicate.
    Raises Missing without common replicates."""
    return Spread.plain(_paired(rows, base, name, lambda own, other: own - other))


def _paired(
    rows: pd.DataFrame, base: pd.DataFrame, name: str, of: Callable[[Any, Any], pd.Series[float]]
) -> pd.Series[float]:
    pairs = of(by_replicate(rows, name), by_replicate(base, name)).dropna()
    if pairs.empty:
        raise Missing(f"{name}: no replicate has both {_label(rows)} and {_label(base)}")
    return pairs


def disturbed(*cells: pd.DataFrame) -> str:
    """Return ' (3 of 12 cells were contaminated by other load)', or an empty string if none was."""
    spoilt = sum(int(own["contaminated"].count()) for own in cells)
    every = sum(len(own) for own in cells)
    return f" ({spoilt} of {every} cells were contaminated by other load)" if spoilt else ""


def _label(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return f"{first['label']} T={first['seq_len']} depth={first['depth']} {first['activations']}"


def large(value: float) -> str:
    """Return a count in words: '201 million', '51.5 billion'."""
    return units.scaled(value, (("billion", 1e9), ("million", 1e6), ("thousand", 1e3), ("", 1.0)))


def growth(sizes: tuple[float, float, float], values: tuple[float, float, float]) -> float:
    """Return the exponent p of a + b·sizeᵖ through three points whose sizes grow by equal factors.

    The constant part a does not affect p. NaN if the values do not increase in both steps.
    """
    first, second = values[1] - values[0], values[2] - values[1]
    assert math.isclose(sizes[1] / sizes[0], sizes[2] / sizes[1])
    return math.log(second / first) / math.log(sizes[1] / sizes[0]) if min(first, second) > 0 else math.nan
