"""Experiment trackers, which receive finished records in addition to the results folder: MLflow, TensorBoard
and Weights & Biases.

Each tracker is one file of this package, found by its name and imported only if it is selected. The record is
on disk before a tracker receives it. If a tracker fails, a one-line message is printed; the record and the
sweep are not affected.
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
from variants.knobs import Knobs, knob

NONE = "none"
_ASKED = ("train_budget", "train_amount", "learning_rate", "eval_split", "budget_bytes")
"""Record keys that are settings although they come after `status`, among the figures."""


@dataclass(frozen=True, kw_only=True)
class TrackerSpec(Knobs):
    """The selected tracker and its storage location."""

    name: str = knob(NONE, decides=False)
    """Tracker that receives finished records, besides the results folder."""
    place: str | None = knob(None, decides=False)
    """A folder or another address that the tracker accepts; null is a folder of its name in results_dir."""


class Tracker(Protocol):
    """The interface of the class `Tracker` in each module of this package.
    Its constructor imports its packages."""

    needs: str
    """Name of the module that must be installed."""

    def __init__(self, place: str, experiment: str) -> None: ...

    def log(self, record: Record, curve: Path) -> None:
        """Log a record and its training curve, a CSV file that may not exist."""
        ...


def names() -> list[str]:
    """Return the names of the available trackers, and `none`."""
    return [NONE, *sorted(module.name for module in pkgutil.iter_modules(__path__))]


def missing(name: str) -> str | None:
    """Return the module that the tracker needs if it is not installed, else None."""
    if name == NONE:
        return None
    needs = _class(name).needs
    return None if importlib.util.find_spec(needs) else needs


def log(spec: TrackerSpec, folder: Path, record: Record) -> None:
    """Log a record of the experiment in `folder` with the selected tracker, if any."""
    if spec.name == NONE:
        return
    try:
        place = spec.place or str(folder.parent / spec.name)
        tracker = _class(spec.name)(place, record.name)
        tracker.log(record, curve_path_of(folder, record.cell_id))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"tracker={spec.name}: failed to log {record.cell_id}: {first}", file=sys.stderr)


def settings(record: Record) -> dict[str, str]:
    """Return a cell's settings as text: its identity, and each knob of its variant, slots and data."""
    values = {key: getattr(record, key) for key in (*KEYS[: KEYS.index("status")], *_ASKED)}
    for key in [key for key in values if key.endswith("_params")]:
        values |= {f"{key.removesuffix('_params')}.{k}": v for k, v in (values.pop(key) or {}).items()}
    return {key: str(value) for key, value in values.items() if value is not None}


def figures(record: Record) -> dict[str, float]:
    """Return a cell's figures: every scalar of the record that is not part of its identity."""
    outcome = KEYS[KEYS.index("status") :]
    values = {key: getattr(record, key) for key in outcome}
    return {
        key: float(value)
        for key, value in values.items()
        if key not in _ASKED and isinstance(value, int | float) and not isinstance(value, bool)
    }


def steps(curve: Path) -> list[dict[str, float]]:
    """Return the rows of a training curve, each with its `step`; empty if the cell did not train."""
    if not curve.is_file():
        return []
    with curve.open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def _class(name: str) -> type[Tracker]:
    tracker: type[Tracker] = importlib.import_module(f"{__name__}.{name}").Tracker
    return tracker
