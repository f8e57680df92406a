"""The records of an experiment's folder: written one a file, read from single files and from parts.

A part, `records/parts/<hash>.jsonl`, holds many records, one a line, and is named by a hash of its content,
so that it never changes: `compact` makes parts. A cell's record may be in several files, where it was
measured again or as a part has just been made; the newest counts, by the number that `Sequence` gave it.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.inputs.printable import printable
from bench.records.bounds import WHOLE
from bench.records.files import ASIDE, RECORDS_DIR, parts_of, path_of, write_atomically
from bench.records.reading import MOST_BYTES, RecordError, parse
from bench.records.record import KEYS, Record, microseconds

if TYPE_CHECKING:
    import pandas as pd

SINGLE, PART = ".json", ".jsonl"


@dataclass(frozen=True, slots=True)
class Found:
    """A record and where it was found, or why there is none."""

    path: Path
    text: str
    """As it stands in the file; empty where that cannot be read."""
    record: Record | None
    problem: str | None
    line: int | None = None
    """Counted from 1, of a part."""
    denied: bool = False
    """Whether there may be a record that this user may not read."""

    @property
    def where(self) -> str:
        """The file, and the line of a part."""
        return _where(self.path, self.line)


def _where(path: Path, line: int | None) -> str:
    return printable(path if line is None else f"{path}:{line}")


def write(folder: Path, record: Record) -> Path:
    """Write one record into the experiment's folder and return its path."""
    path = path_of(folder, record.cell_id)
    write_atomically(path, record.to_json())
    return path


def read(folder: Path, cell_id: str) -> Record | None:
    """The cell's newest record, or None where there is none that can be read.

    Raises PermissionError where there may be one that this user may not read.
    """
    found = [one.record for one in _allowed(read_file(path_of(folder, cell_id)))]
    for path in parts(folder):
        try:
            stat = path.stat()
        except OSError:  # gathered into a larger part
            continue
        if line := _part_index(path, stat.st_mtime_ns, stat.st_size).get(cell_id):
            found.append(_found(path, line, None).record)
    same = [record for record in found if record and record.cell_id == cell_id]
    return max(same, key=lambda record: record.age, default=None)


@lru_cache(maxsize=64)
def _part_index(path: Path, modified: int, size: int) -> dict[str, str]:
    """The lines of a part by their cells; a sweep asks for one cell after another."""
    index = {}
    for one in _allowed(read_file(path)):
        if one.record:
            index[one.record.cell_id] = one.text
    return index


def _allowed(found: list[Found]) -> list[Found]:
    for one in found:
        if one.denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(one.path))
    return found


_DATED = re.compile(rb'"(?:sequence": ?(\d{1,19})|started_at": ?"([^"]{1,40})")')
"""What orders a record, as it stands in a file."""


class Sequence:
    """Numbers for the records of a folder, in the order in which they are written.

    A number is the time in microseconds since 1970, or one more than the highest in the folder: what is
    measured last counts as the newest, whatever clock dated what was there before, in every cell and of
    every version of the code. Where folders of several machines are merged it is the time that orders them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: int | None = None

    def next(self) -> int:
        """A number for the record that is about to be written."""
        if self._last is None:
            self._last = max((_latest_in(path) for path in _files(self._folder)), default=0)
        self._last = min(max(time.time_ns() // 1000, self._last + 1), WHOLE)
        return self._last


def _latest_in(path: Path) -> int:
    """The highest number of the records in a file; their text is searched, which is fast."""
    try:
        text = _text(path).encode()
    except (OSError, UnicodeDecodeError):
        return 0
    found = _DATED.findall(text)
    return max((int(number or microseconds(date.decode())) for number, date in found), default=0)


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """Every readable record of an experiment, oldest first, and a line for each file that is not one.

    Of each cell the newest record, wherever it lies.
    """
    newest: dict[str, Record] = {}
    problems = []
    with _no_collection():
        for one in find(folder):
            if one.problem:
                problems.append(one.problem)
            if one.record:
                known = newest.setdefault(one.record.cell_id, one.record)
                if known is not one.record and one.record.age > known.age:
                    newest[one.record.cell_id] = one.record
    return sorted(newest.values(), key=lambda r: (r.written, r.cell_id)), problems


def load(folder: str | Path) -> pd.DataFrame:
    """The experiment's readable records as a DataFrame: one row a cell, one column a key."""
    return frame_of(read_all(Path(folder))[0])


def frame_of(records: list[Record]) -> pd.DataFrame:
    """One row a record, one column a key."""
    import pandas as pd

    return pd.DataFrame(columns_of(records))


def columns_of(records: list[Record]) -> dict[str, list[Any]]:
    """Each key's values, record by record."""
    rows = [vars(record) for record in records]  # twice as fast as asking each record for each key
    return {key: [row[key] for row in rows] for key in KEYS}


def find(folder: Path) -> Iterator[Found]:
    """Whatever lies where an experiment's records do and may be one, superseded ones and damaged ones too."""
    for path in _files(folder):
        yield from read_file(path)


def _files(folder: Path) -> Iterator[Path]:
    yield from singles(folder)
    yield from parts(folder)


def singles(folder: Path) -> list[Path]:
    """Files of one record, in order, with those that `compact` has put aside."""
    return _listed(folder / RECORDS_DIR, (SINGLE, ASIDE))


def parts(folder: Path) -> Iterator[Path]:
    """Files of many, in order; then those that have taken the place of some meanwhile."""
    seen: set[Path] = set()
    while fresh := [path for path in _listed(parts_of(folder), (PART,)) if path not in seen]:
        seen.update(fresh)
        yield from fresh


def _listed(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(suffixes))
    except FileNotFoundError:
        return []
    return [folder / name for name in names]


def read_file(path: Path) -> list[Found]:
    """What a file holds: one record, or those of a part; nothing where it has just gone."""
    try:
        text = _text(path)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return []  # gathered into a part, or put back, since it was listed
        denied = isinstance(error, PermissionError)
        return [Found(path, "", None, printable(f"{path}: {error}", 400), denied=denied)]
    if path.suffix != PART:
        return [_found(path, text, None)]
    lines = text.removesuffix("\n").split("\n")
    return [_found(path, line, number) for number, line in enumerate(lines, 1)]


def _found(path: Path, text: str, line: int | None) -> Found:
    try:
        return Found(path, text, parse(text, _where(path, line)), None, line)
    except RecordError as error:
        return Found(path, text, None, str(error), line)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError("no file") if not path.exists() else OSError("not a file")
    if path.stat().st_size > MOST_BYTES:
        raise OSError(f"larger than {MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the search for cycles, of which records have none: it would go through all of them time and
    again, a third of the time that 20,000 take."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
