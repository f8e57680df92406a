"""One experiment, read and sorted by the questions of its cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.records import RECORDS_DIR
from bench.report import ReportError
from bench.report.data.collect import Collected, collect
from bench.report.data.kinds import Kinds, kinds
from bench.report.data.noise_floor import Noise, noises


@dataclass(frozen=True)
class Experiment:
    """The records of a folder: all of them in `collected`, the current ones by kind in `kinds`."""

    folder: Path
    collected: Collected
    kinds: Kinds

    @cached_property
    def noises(self) -> Mapping[str, Noise]:
        """Machine → its noise; see `noise_floor.noises`."""
        return noises(self.collected.every)


def read(folder: Path) -> Experiment:
    """Read an experiment's folder; see `collect` and `kinds`.

    Raises ReportError for a missing folder, for one without a readable record, and for one with twins only.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    collected = collect(folder)
    if not collected.every.empty and collected.frame.empty:
        raise ReportError(f"{folder}: only twins; measure the same cells with twin=0 too")
    if collected.frame.empty:
        unread = f" ({len(collected.problems)} files there cannot be read)" if collected.problems else ""
        raise ReportError(f"{folder}: no records in {folder / RECORDS_DIR}{unread}")
    return Experiment(folder, collected, kinds(collected.frame))
