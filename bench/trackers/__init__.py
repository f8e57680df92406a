"""Where finished records go besides the results folder: to MLflow, to TensorBoard, or nowhere else.

One file a tracker, found by its name in this package; none is imported before it is asked for. The record
is on disk before a tracker sees it, and what a tracker fails at costs a line, never a record or a sweep.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.records import KEYS, Record, curve_path_of

NONE = "none"
_ASKED = ("train_budget", "train_amount", "learning_rate", "eval_split", "budget_bytes")
"""Keys of a record that are settings though they stand among its figures."""


@dataclass(frozen=True, kw_only=True)
class TrackerSpec:
    """Which tracker, and where it keeps what it is told."""

    name: str = NONE
    place: str | None = None
    """A folder, or what else the tracker calls an address; null is a folder of its own under results_dir."""


class Tracker(Protocol):
    """What a module of this package has under the name `Tracker`; making it reaches for its packages."""

    needs: str
    """The module that must be installed."""

    def __init__(self, place: str, experiment: str) -> None: ...

    def log(self, record: Record, curve: Path) -> None:
        """Take a record and its training curve, a CSV file that need not exist."""
        ...


def names() -> list[str]:
    """The trackers there are, and `none`."""
    return [NONE, *sorted(module.name for module in pkgutil.iter_modules(__path__))]


def missing(name: str) -> str | None:
    """The module that the tracker needs and that is not installed."""
    if name == NONE:
        return None
    needs = _class(name).needs
    return None if importlib.util.find_spec(needs) else needs


def log(spec: TrackerSpec, folder: Path, record: Record) -> None:
    """Hand a record of the experiment in `folder` to the tracker, if there is one."""
    if spec.name == NONE:
        return
    try:
        place = spec.place or str(folder.parent / spec.name)
        tracker = _class(spec.name)(place, record.name)
        tracker.log(record, curve_path_of(folder, record.cell_id))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"tracker={spec.name}: not told of {record.cell_id}: {first}", file=sys.stderr)


def settings(record: Record) -> dict[str, str]:
    """What was asked of a cell, as text: its identity, each knob of variant and data by its own name."""
    found = {key: getattr(record, key) for key in (*KEYS[: KEYS.index("status")], *_ASKED)}
    for group in ("variant_params", "data_params"):
        found |= {f"{group.removesuffix('_params')}.{k}": v for k, v in (found.pop(group) or {}).items()}
    return {key: str(value) for key, value in found.items() if value is not None}


def figures(record: Record) -> dict[str, float]:
    """What came of it: every single number of the record that is not part of its identity."""
    outcome = KEYS[KEYS.index("status") :]
    values = {key: getattr(record, key) for key in outcome}
    return {
        key: float(value)
        for key, value in values.items()
        if key not in _ASKED and isinstance(value, int | float) and not isinstance(value, bool)
    }


def steps(curve: Path) -> list[dict[str, float]]:
    """The rows of a training curve, each with its `step`; none where the cell trained nothing."""
    if not curve.is_file():
        return []
    with curve.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _class(name: str) -> type[Tracker]:
    found: type[Tracker] = importlib.import_module(f"{__name__}.{name}").Tracker
    return found
