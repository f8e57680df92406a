"""The records of an experiment's folder: written as single files, read from single files and parts.

A part, `records/parts/<hash>.jsonl`, holds many records, one per line. Its name is a hash of its content, so
it never changes. `compact` creates parts. A cell may have records in several files, because it was measured
again or a part has just been created. The newest record, by its number (`SequenceNumbers`), is used.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.inputs.printable import printable
from bench.records.bounds import MAX_INT
from bench.records.files import ASIDE, RECORDS_DIR, parts_of, path_of, write_atomically
from bench.records.reading import MAX_BYTES, RecordError, parse
from bench.records.record import KEYS, Record, microseconds

if TYPE_CHECKING:
    import pandas as pd

SINGLE, PART = ".json", ".jsonl"


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record and its location, or the reason why it cannot be read."""

    path: Path
    text: str
    """The text in the file; empty if the file cannot be read."""
    record: Record | None
    problem: str | None
    line: int | None = None
    """Line number in a part, from 1; None for a single file."""
    denied: bool = False
    """Whether this user has no permission to read the file."""

    @property
    def where(self) -> str:
        """The file, with the line number for a part."""
        return _where(self.path, self.line)


def _where(path: Path, line: int | None) -> str:
    return printable(path if line is None else f"{path}:{line}")


def write(folder: Path, record: Record) -> Path:
    """Write one record into the experiment's folder; returns its path."""
    path = path_of(folder, record.cell_id)
    write_atomically(path, record.to_json())
    return path


def read(folder: Path, cell_id: str) -> Record | None:
    """Return the cell's newest record, or None if there is no readable one.

    Raises PermissionError if this user has no permission to read a file that may hold one.
    """
    records = [one.record for one in _allowed(read_file(path_of(folder, cell_id)))]
    for path in part_files(folder):
        try:
            stat = path.stat()
        except OSError:  # removed since it was listed: its records are in a larger part
            continue
        if line := _part_index(path, stat.st_mtime_ns, stat.st_size).get(cell_id):
            records.append(_parsed(path, line, None).record)
    same = [record for record in records if record and record.cell_id == cell_id]
    return max(same, key=lambda record: record.recency, default=None)


@lru_cache(maxsize=64)
def _part_index(path: Path, modified: int, size: int) -> dict[str, str]:
    """Return the lines of a part by cell id. Cached, because a sweep reads one cell after another."""
    index = {}
    for one in _allowed(read_file(path)):
        if one.record:
            index[one.record.cell_id] = one.text
    return index


def _allowed(records: list[StoredRecord]) -> list[StoredRecord]:
    for one in records:
        if one.denied:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(one.path))
    return records


_DATED = re.compile(rb'"(?:sequence": ?(\d{1,19})|started_at": ?"([^"]{1,40})")')
"""The keys that order records, in the text of a file."""


class SequenceNumbers:
    """Increasing numbers for the records of a folder, in the order in which they are written.

    A number is the time in microseconds since 1970, or one more than the highest number in the folder.
    Therefore the record that was measured last is the newest, even if earlier records were dated by a clock
    that was ahead. If the folders of several machines are merged, their records are ordered by time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._last: int | None = None

    def next(self) -> int:
        """Return the number of the record that is about to be written."""
        if self._last is None:
            self._last = max((_latest_in(path) for path in _files(self._folder)), default=0)
        self._last = min(max(time.time_ns() // 1000, self._last + 1), MAX_INT)
        return self._last


def _latest_in(path: Path) -> int:
    """Return the highest number of the records in a file, by a fast text search."""
    try:
        text = _text(path).encode()
    except (OSError, UnicodeDecodeError):
        return 0
    matches = _DATED.findall(text)
    return max((int(number or microseconds(date.decode())) for number, date in matches), default=0)


def read_all(folder: Path) -> tuple[list[Record], list[str]]:
    """Return the newest readable record of each cell, oldest first, and one message per unreadable record."""
    newest: dict[str, Record] = {}
    problems = []
    with _no_collection():
        for one in find_records(folder):
            if one.problem:
                problems.append(one.problem)
            if one.record:
                known = newest.setdefault(one.record.cell_id, one.record)
                if known is not one.record and one.record.recency > known.recency:
                    newest[one.record.cell_id] = one.record
    return sorted(newest.values(), key=lambda r: (r.order, r.cell_id)), problems


def load(folder: str | Path) -> pd.DataFrame:
    """Load the experiment's records as a DataFrame: one row per cell, one column per key.

    A record that cannot be read is left out with a warning that names it. Raises FileNotFoundError if there
    is no such folder.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found, problems = read_all(Path(folder))
    for problem in problems:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    return frame_of(found)


def frame_of(records: list[Record]) -> pd.DataFrame:
    """Return a DataFrame with one row per record and one column per key."""
    import pandas as pd

    return pd.DataFrame(columns_of(records))


def columns_of(records: list[Record]) -> dict[str, list[Any]]:
    """Return the values of each key, in the order of the records."""
    rows = [vars(record) for record in records]  # twice as fast as reading each attribute of each record
    return {key: [row[key] for row in rows] for key in KEYS}


def find_records(folder: Path) -> Iterator[StoredRecord]:
    """Yield every file or line that may be a record of the experiment,
    including superseded and damaged ones."""
    for path in _files(folder):
        yield from read_file(path)


def _files(folder: Path) -> Iterator[Path]:
    yield from single_files(folder)
    yield from part_files(folder)


def single_files(folder: Path) -> list[Path]:
    """Return the sorted files that hold one record, including those that `compact` has moved aside."""
    return _listed(folder / RECORDS_DIR, (SINGLE, ASIDE))


def part_files(folder: Path) -> Iterator[Path]:
    """Yield the parts in order, then the parts that another process has created since the listing."""
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


def read_file(path: Path) -> list[StoredRecord]:
    """Read a file: one record, or those of a part; nothing if the file has just been removed."""
    try:
        text = _text(path)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return []  # compacted or renamed since it was listed
        denied = isinstance(error, PermissionError)
        return [StoredRecord(path, "", None, printable(f"{path}: {error}", 400), denied=denied)]
    if path.suffix != PART:
        return [_parsed(path, text, None)]
    lines = text.removesuffix("\n").split("\n")
    return [_parsed(path, line, number) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, text: str, line: int | None) -> StoredRecord:
    try:
        return StoredRecord(path, text, parse(text, _where(path, line)), None, line)
    except RecordError as error:
        return StoredRecord(path, text, None, str(error), line)


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError("no file") if not path.exists() else OSError("not a file")
    if path.stat().st_size > MAX_BYTES:
        raise OSError(f"larger than {MAX_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Disable cyclic garbage collection. Records have no reference cycles, and the collector would take a
    third of the time to read 20,000 of them."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
