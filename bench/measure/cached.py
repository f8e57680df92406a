"""Figures that are taken once for all cells of a run that they hold for, and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.config.spec import digest
from bench.records import write_atomically


def path_of(folder: Path, decides: list[Any]) -> Path:
    """The file of the figures that `decides`, a JSON value, decides."""
    return folder / f"{digest(decides)}.json"


def once(
    folder: Path, decides: list[Any], take: Callable[[], dict[str, Any]], keys: set[str]
) -> dict[str, Any]:
    """What `take` found, or what it found before for the same `decides`; leaves randomness as it was.

    A file that holds other keys, or cannot be read, is taken again.
    """
    path = path_of(folder, decides)
    if before := _kept(path, keys):
        return before
    with torch.random.fork_rng():
        found = take()
    if meanwhile := _kept(path, keys):  # by a cell on another device: all are to have the same
        return meanwhile
    write_atomically(path, json.dumps(found))
    return found


def _kept(path: Path, keys: set[str]) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return kept if isinstance(kept, dict) and kept.keys() == keys else None
