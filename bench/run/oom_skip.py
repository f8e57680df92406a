"""Lines of cells, alike in all but their length: past a length that ran out of memory, none is tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.config.spec import Cell
from bench.records import Record


class Lines:
    """The shortest length of each line that is known to run out of memory, and the cell that did."""

    def __init__(self, known: Iterable[tuple[Cell, Record]]) -> None:
        self._least: dict[str, tuple[int, str]] = {}
        for cell, record in known:
            self.note(cell, record)

    def note(self, cell: Cell, record: Record) -> None:
        """What a cell came to. Only one that ran counts: a prediction is made for each length anew."""
        if record.status == "oom":
            line, found = _line(cell), (cell.spec.seq_len, record.cell_id)
            self._least[line] = min(found, self._least.get(line, found))

    def past(self, cell: Cell) -> str | None:
        """Why a cell is not tried; None where it is."""
        seq_len, cell_id = self._least.get(_line(cell), (cell.spec.seq_len, ""))
        if not cell.skip_after_oom or cell.spec.seq_len <= seq_len:
            return None
        return (
            f"the same at seq_len={seq_len} ran out of memory (cell {cell_id}); skip_after_oom=false tries it"
        )


def _line(cell: Cell) -> str:
    return repr((cell.folder, replace(cell.spec, seq_len=0)))
