"""The problems of an experiment's folder, file by file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.inputs.printable import printable
from bench.records.files import ASIDE, CURVES_DIR, TEMPORARY, is_abandoned, path_of
from bench.records.migrations import SCHEMA_VERSION
from bench.records.record import Record
from bench.records.store import PART, StoredRecord, find_records, read_all

BESIDE = (CURVES_DIR, "checkpoints", "logs")
"""Folders whose files are named after the cell that they belong to."""


@dataclass(frozen=True)
class Problem:
    """One problem: one line of the command's output."""

    kind: str
    text: str
    """A description that names the file."""
    loses_record: bool = False
    """Whether readers of the folder cannot read a record because of this problem."""


def check(folder: Path) -> list[Problem]:
    """Return all problems of an experiment's folder; those that lose data come first.

    - Unreadable: truncated, of a foreign format, or written by a later version of the program.
    - Older: of an earlier schema version; it is read nevertheless.
    - Duplicate: a newer record of the same cell is used instead, or the same record exists twice.
    - Wrong name: a sweep does not find the file and measures the cell again.
    - Stale: the cell was later measured with other code or data; the record is kept but not in the tables.
    - Future: its date is ahead of this machine's clock. Records are ordered by when they were written, not by
      their dates.
    - Unfinished: a temporary file of a process that died.
    - Left over: a curve, checkpoint or log of a cell that has no record.
    """
    everything = list(find_records(folder))
    cells = {one.record.cell_id for one in everything if one.record}
    problems = [Problem("unreadable", one.problem, loses_record=True) for one in everything if one.problem]
    problems += [problem for one in everything if one.record for problem in _of_file(folder, one, one.record)]
    problems += _duplicates(everything)
    problems += _stale(folder) if cells else []
    problems += [
        Problem("unfinished", f"{printable(path)}: its writer died before it was complete")
        for path in sorted(folder.rglob(f".*{TEMPORARY}"))
        if is_abandoned(path)
    ]
    problems += _left_over(folder, cells)
    return sorted(problems, key=lambda problem: not problem.loses_record)


def _of_file(folder: Path, one: StoredRecord, record: Record) -> Iterator[Problem]:
    version = json.loads(one.text)["schema_version"]
    if version < SCHEMA_VERSION:
        yield Problem("older", f"{one.where}: schema version {version}, read as {SCHEMA_VERSION}")
    if record.in_future(time.time()):
        yield Problem("future", f"{one.where}: started_at={printable(record.started_at, 40)} is ahead of now")
    if one.path.suffix == ASIDE:
        if is_abandoned(one.path):
            yield Problem("unfinished", f"{one.where}: moved aside by a compaction that died")
    elif one.path.suffix != PART and one.path != path_of(folder, record.cell_id):
        yield Problem("wrong name", f"{one.where}: it holds the record of cell {record.cell_id}")


def _duplicates(everything: list[StoredRecord]) -> Iterator[Problem]:
    newest: dict[str, StoredRecord] = {}
    known = [(one, one.record) for one in everything if one.record]
    for one, record in sorted(known, key=lambda pair: pair[1].recency):
        newest[record.cell_id] = one
    for one, record in known:
        best = newest[record.cell_id]
        if one is best or best.record is None:
            continue
        same = best.record.recency == record.recency
        yield Problem(
            "duplicate",
            f"{one.where}: cell {record.cell_id} is also in {best.where}"
            + ("" if same else ", which is newer and is used"),
        )


def _stale(folder: Path) -> Iterator[Problem]:
    from bench.records.configurations import filled_in, reasons, table  # pandas, which other checks need not

    for cell_id, why in reasons(filled_in(table(read_all(folder)[0]))).items():
        yield Problem("stale", f"{printable(path_of(folder, cell_id))}: {printable(why)}")


def _left_over(folder: Path, cells: set[str]) -> Iterator[Problem]:
    for name in BESIDE:
        for path in sorted((folder / name).glob("[!.]*")):
            if path.stem not in cells:
                yield Problem("left over", f"{printable(path)}: its cell has no record")
