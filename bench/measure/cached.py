"""Figures that are measured once for all cells of a run to which they apply, and cached in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.config.spec import digest
from bench.records import write_atomically


def path_of(folder: Path, decides: list[Any]) -> Path:
    """Return the file of the figures that the JSON value `decides` determines."""
    return folder / f"{digest(decides)}.json"


def load_or_measure(
    folder: Path, decides: list[Any], take: Callable[[], dict[str, Any]], keys: set[str]
) -> dict[str, Any]:
    """Return the result of `take`, or its cached result for the same `decides`. The state of the random
    generators is preserved.

    If the cached file has other keys or cannot be read, `take` is called again.
    """
    path = path_of(folder, decides)
    if cached := _cached(path, keys):
        return cached
    with torch.random.fork_rng():
        measured = take()
    if other := _cached(path, keys):  # a cell on another device was faster; all cells use one value
        return other
    write_atomically(path, json.dumps(measured))
    return measured


def _cached(path: Path, keys: set[str]) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return stored if isinstance(stored, dict) and stored.keys() == keys else None
