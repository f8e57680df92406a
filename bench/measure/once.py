"""Figures that are taken once for all cells of a run that they hold for, and kept in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.config import digest
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
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        before = None
    if isinstance(before, dict) and before.keys() == keys:
        return before
    with torch.random.fork_rng():
        found = take()
    write_atomically(path, json.dumps(found))
    return found
