"""Skips cells that are longer than an otherwise equal cell that ran out of memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.config.spec import Cell
from bench.records import Record


class OutOfMemorySkip:
    """For each group of cells that differ only in length:
    the shortest length that ran out of memory, and its cell."""

    def __init__(self, known: Iterable[tuple[Cell, Record]]) -> None:
        self._shortest: dict[str, tuple[int, str]] = {}
        for cell, record in known:
            self.add(cell, record)

    def add(self, cell: Cell, record: Record) -> None:
        """Register the result of a cell.
        Only cells that ran are considered, because each length is predicted separately."""
        if record.status == "oom":
            group, shortest = _group(cell), (cell.spec.seq_len, record.cell_id)
            self._shortest[group] = min(shortest, self._shortest.get(group, shortest))

    def reason(self, cell: Cell) -> str | None:
        """Return why a cell is skipped, or None if it is not."""
        seq_len, cell_id = self._shortest.get(_group(cell), (cell.spec.seq_len, ""))
        if not cell.skip_after_oom or cell.spec.seq_len <= seq_len:
            return None
        return f"seq_len={seq_len} ran out of memory (cell {cell_id}); skip_after_oom=false runs longer cells"


def _group(cell: Cell) -> str:
    return repr((cell.folder, replace(cell.spec, seq_len=0)))
