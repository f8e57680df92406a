"""What is wrong in an experiment's folder, file by file."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.inputs.printable import printable
from bench.records.files import ASIDE, CURVES_DIR, TEMPORARY, abandoned, path_of
from bench.records.migrations import SCHEMA_VERSION
from bench.records.record import Record
from bench.records.store import PART, Found, find, read_all

BESIDE = (CURVES_DIR, "checkpoints", "logs")
"""Folders whose files are named by the cell that they belong to."""


@dataclass(frozen=True)
class Problem:
    """One line of the list."""

    kind: str
    text: str
    """Names the file."""
    loses: bool = False
    """Whether a record is lost to whoever reads the folder."""


def check(folder: Path) -> list[Problem]:
    """All problems of an experiment's folder, those that lose data first.

    Unreadable: truncated, foreign, or of a later program. Older: of an earlier schema version, and read all
    the same. Duplicate: a newer record of the same cell counts, or the same one is there twice. Wrong name:
    a sweep does not find it, and measures the cell again. Stale: measured with code or data that the cell was
    measured without since; kept and left out of the tables. Future: dated by a clock that is ahead of this
    machine's; the order in which records were written counts, not their dates. Unfinished: what a writer that
    died left. Left over: a curve, checkpoint or log of a cell that has no record.
    """
    everything = list(find(folder))
    cells = {one.record.cell_id for one in everything if one.record}
    problems = [Problem("unreadable", one.problem, loses=True) for one in everything if one.problem]
    problems += [problem for one in everything if one.record for problem in _of_file(folder, one, one.record)]
    problems += _duplicates(everything)
    problems += _stale(folder) if cells else []
    problems += [
        Problem("unfinished", f"{printable(path)}: a process died as it wrote this")
        for path in sorted(folder.rglob(f".*{TEMPORARY}"))
        if abandoned(path)
    ]
    problems += _left_over(folder, cells)
    return sorted(problems, key=lambda problem: not problem.loses)


def _of_file(folder: Path, one: Found, record: Record) -> Iterator[Problem]:
    version = json.loads(one.text)["schema_version"]
    if version < SCHEMA_VERSION:
        yield Problem("older", f"{one.where}: schema version {version}, read as {SCHEMA_VERSION}")
    if record.in_future(time.time()):
        yield Problem("future", f"{one.where}: started_at={printable(record.started_at, 40)} is yet to come")
    if one.path.suffix == ASIDE:
        if abandoned(one.path):
            yield Problem("unfinished", f"{one.where}: put aside by a process that died as it compacted")
    elif one.path.suffix != PART and one.path != path_of(folder, record.cell_id):
        yield Problem("wrong name", f"{one.where}: it is the record of cell {record.cell_id}")


def _duplicates(everything: list[Found]) -> Iterator[Problem]:
    newest: dict[str, Found] = {}
    known = [(one, one.record) for one in everything if one.record]
    for one, record in sorted(known, key=lambda pair: pair[1].age):
        newest[record.cell_id] = one
    for one, record in known:
        best = newest[record.cell_id]
        if one is best or best.record is None:
            continue
        same = best.record.age == record.age
        yield Problem(
            "duplicate",
            f"{one.where}: cell {record.cell_id} is in {best.where} too"
            + ("" if same else ", measured later, which counts"),
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
