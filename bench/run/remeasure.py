"""Cells that other load disturbed are measured again by the sweep itself, at the end of their round.

Only the cost is measured again, because nothing but times is disturbed: the figures of training stay those of
the first measurement. Of both measurements that with less disturbance is kept. The first record stays in
place until the second measurement has ended, so that nothing is lost if the sweep is killed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from bench.config.spec import Cell
from bench.records import Record

LEAST_SECONDS = 60.0
"""Time for repeated measurements that every sweep has."""
SHARE = 0.25
"""The further time for them, as a share of the time of the sweep's first measurements."""


def is_due(cell: Cell, record: Record | None) -> bool:
    """Return whether the sweep measures a cell with this record again. A cell has one repetition, also if the
    sweep is interrupted and continued."""
    return (
        cell.remeasure
        and record is not None
        and record.status == "ok"
        and record.contaminated is not None
        and record.attempts == 1
    )


def expected_seconds(record: Record) -> float:
    """Return an upper bound on the time of a repetition: that of the cell without its training."""
    return max(0.0, (record.seconds_total or 0.0) - (record.train_seconds or 0.0))


def disturbance(load: Mapping[str, Any]) -> tuple[bool, float, float]:
    """Return a sort key for the load during a measurement, given by record key; the least disturbed first."""
    return load["contaminated"] is not None, load["wait_share"] or 0.0, load["foreign_cores"] or 0.0


def better(first: Record, figures: Mapping[str, Any]) -> tuple[Record, str]:
    """Return the record of a cell after its repetition, and what came of it, in words.

    `figures` are those of the repetition, by record key. Its figures replace those of `first` if it ended and
    was less disturbed; the seconds that the cell took are the sum of both.
    """
    both: dict[str, Any] = {"attempts": (first.attempts or 1) + 1, "sequence": None}
    for key in ("seconds_total", "seconds_work"):
        both[key] = (getattr(first, key) or 0.0) + (figures.get(key) or 0.0)
    why: str | None = None
    if figures["status"] != "ok":
        why = f"{figures['status']}: {figures['reason']}"
    elif disturbance(figures) >= disturbance(vars(first)):
        why = f"no less disturbed: {figures['contaminated']}"
    if why:
        return replace(first, **both), f"the first measurement is kept, the second was {why}"
    outcome = "undisturbed" if figures["contaminated"] is None else "less disturbed"
    return replace(first, **(dict(figures) | both)), f"{outcome}, replaces the first measurement"


@dataclass
class Allowance:
    """The time for repetitions that a sweep has on one kind of device. Threads share it."""

    first_seconds: float = 0.0
    """Time of the first measurements so far."""
    again_seconds: float = 0.0
    """Expected time of the repetitions so far, those that are running included."""
    refused: int = 0
    """Number of cells that were not measured again."""
    _counting: threading.Lock = field(default_factory=threading.Lock)

    def spend(self, record: Record) -> None:
        """Note the first measurement of a cell."""
        with self._counting:
            self.first_seconds += record.seconds_total or 0.0

    def permits(self, record: Record) -> bool:
        """Return whether there is time to measure a cell again, and reserve it."""
        seconds = expected_seconds(record)
        with self._counting:
            permitted = self.again_seconds + seconds <= LEAST_SECONDS + SHARE * self.first_seconds
            self.again_seconds += seconds * permitted
            self.refused += not permitted
        return permitted
