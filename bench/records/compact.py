"""Compaction: the records of an experiment, combined from many small files into few parts, one record per
line.

The format is JSON lines rather than a columnar table: each line is one unmodified record, with any keys and
arbitrarily large numbers, and Git and people can read it. A part has at most `PART_BYTES`, so that hosting
services accept it and a small addition does not rewrite a large file.

No record is lost if the process is killed at any point, or if other processes write, read or compact at the
same time:

- Parts are complete and on the disk before any file is removed.
- A file is read again before it is removed; its record, or a newer one of the same cell, must be in a part.
- A single file is first renamed (moved aside), so that no other process can replace it. It is renamed back if
  its content is no longer the record that was combined.
- If the process dies at that point, the renamed file is still read as a record.
- Files that cannot be read stay in place.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from bench.records.files import (
    ASIDE,
    TEMPORARY,
    is_abandoned,
    parts_of,
    path_of,
    remove,
    temporary_path,
    write_atomically,
)
from bench.records.record import Record
from bench.records.store import PART, StoredRecord, part_files, read_file, single_files

PART_BYTES = 16 * 2**20
"""Maximum size of a part. A part of at least half this size is not rewritten."""


@dataclass
class Compacted:
    """The result of compacting an experiment's folder."""

    gathered: int = 0
    """Number of single files whose records are now in parts."""
    parts: list[Path] = field(default_factory=list)
    """All parts of the folder."""
    temporaries: int = 0
    """Number of temporary files of dead processes that were removed."""
    problems: list[str] = field(default_factory=list)
    """Descriptions of the files that could not be read and were left in place."""


def compact(folder: Path) -> Compacted:
    """Combine the folder's records into parts, and remove the leftovers of dead processes."""
    done = Compacted()
    alone = [one for path in single_files(folder) if _is_free(path) for one in read_file(path)]
    done.problems = [one.problem for one in alone if one.problem]
    old = {path: read_file(path) for path in part_files(folder)}
    full = {path for path, lines in old.items() if _is_full(path, lines)}
    loose = [one for path, lines in old.items() if path not in full for one in lines]
    done.problems += [one.problem for one in loose if one.problem]
    stored = _newest(one.record for path in full for one in old[path])
    gathered = _newest(one.record for one in [*alone, *loose])
    fresh = [r for cell, r in gathered.items() if cell not in stored or r.recency > stored[cell].recency]
    made = {_write(folder, lines) for lines in _split_into_parts(sorted(r.to_line() for r in fresh))}
    done.parts = sorted(full | made)
    stored = _newest(one.record for path in done.parts for one in read_file(path))  # re-read
    for one in alone:
        if one.record and _is_stored(one.record, stored):
            done.gathered += _remove_single(folder, one, stored)
    for path in old.keys() - full - made:
        if all(one.record and _is_stored(one.record, stored) for one in read_file(path)):
            path.unlink(missing_ok=True)
        else:
            done.parts.append(path)
    done.temporaries = _remove_temporaries(folder)
    return done


def _is_free(path: Path) -> bool:
    """Return whether no other process works on a file."""
    return not path.name.endswith(ASIDE) or is_abandoned(path)


def _is_full(path: Path, lines: list[StoredRecord]) -> bool:
    """Return whether a part is not rewritten: it is large and already in the current format."""
    large = sum(len(one.text) for one in lines) >= PART_BYTES // 2
    return large and all(one.record and one.record.to_line() == one.text + "\n" for one in lines)


def _newest(records: Iterable[Record | None]) -> dict[str, Record]:
    newest: dict[str, Record] = {}
    for record in records:
        if record and (record.cell_id not in newest or record.recency > newest[record.cell_id].recency):
            newest[record.cell_id] = record
    return newest


def _is_stored(record: Record, stored: dict[str, Record]) -> bool:
    """Return whether `stored` contains the record or a newer one of its cell."""
    return record.cell_id in stored and stored[record.cell_id].recency >= record.recency


def _split_into_parts(lines: list[str]) -> list[str]:
    """Split the lines into texts of at most `PART_BYTES` each, or of a single longer line."""
    texts: list[list[str]] = []
    size = PART_BYTES
    for line in lines:
        if size + len(line) > PART_BYTES:
            texts.append([])
            size = 0
        texts[-1].append(line)
        size += len(line)
    return ["".join(text) for text in texts]


def _write(folder: Path, text: str) -> Path:
    """Write the part with this content, unless it exists; its name is a hash of the content."""
    content = text.encode()
    path = parts_of(folder) / f"{hashlib.sha256(content).hexdigest()[:16]}{PART}"
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, text)
    return path


def _remove_single(folder: Path, one: StoredRecord, stored: dict[str, Record]) -> bool:
    """Remove a single file whose record is in a part, unless the file has changed since it was read."""
    aside = one.path if one.path.name.endswith(ASIDE) else temporary_path(one.path, ASIDE)
    try:
        one.path.replace(aside)
    except FileNotFoundError:  # another process compacts too
        return False
    now = [found.record for found in read_file(aside)]
    gone = all(record and _is_stored(record, stored) for record in now)
    if gone or _restore_name(folder, aside, one):
        aside.unlink(missing_ok=True)
    return gone


def _restore_name(folder: Path, aside: Path, one: StoredRecord) -> bool:
    """Give a file that was moved aside its name again. If that name is taken or cannot be used, the file
    keeps its temporary name, under which it is still read and combined."""
    try:
        os.link(aside, path_of(folder, one.record.cell_id) if one.record else one.path)
    except OSError:
        return False
    return True


def _remove_temporaries(folder: Path) -> int:
    removed = 0
    for path in list(folder.rglob(f".*{TEMPORARY}")):
        if is_abandoned(path):
            remove(path)
            removed += 1
    return removed
