"""Many small files into few: the records of an experiment gathered into parts, with a line each.

JSON lines, and not a table of columns: a line is the record as it is, whatever keys it has and however large
its numbers, and Git and people can read it. A part has at most `PART_BYTES`, so that a hosting service takes
it and a small addition makes no large file anew.

Nothing is lost wherever this is killed, and whoever else writes, reads or compacts meanwhile: parts are
whole and on the disk before anything is removed; what is removed is read once more and must be in a part, or
be older than the record of its cell that is; and a single file is put aside under another name first, where
nobody can replace it, and put back where it is no longer what was gathered. What was put aside by somebody
who died there is still read as a record. What cannot be read stays where it is.
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
    abandoned,
    beside,
    parts_of,
    path_of,
    remove,
    write_atomically,
)
from bench.records.record import Record
from bench.records.store import PART, Found, parts, read_file, singles

PART_BYTES = 16 * 2**20
"""The most that a part has; one of half of that or more is left as it is."""


@dataclass
class Compacted:
    """What was done to an experiment's folder."""

    gathered: int = 0
    """Single files whose records are in parts now."""
    parts: list[Path] = field(default_factory=list)
    """All that there are."""
    temporaries: int = 0
    """Temporary files of dead writers that were removed."""
    problems: list[str] = field(default_factory=list)
    """What was left where it is because it cannot be read."""


def compact(folder: Path) -> Compacted:
    """Gather the folder's records into parts and remove what processes that died left."""
    done = Compacted()
    alone = [one for path in singles(folder) if _free(path) for one in read_file(path)]
    done.problems = [one.problem for one in alone if one.problem]
    old = {path: read_file(path) for path in parts(folder)}
    full = {path for path, lines in old.items() if _full(path, lines)}
    loose = [one for path, lines in old.items() if path not in full for one in lines]
    done.problems += [one.problem for one in loose if one.problem]
    held = _newest(one.record for path in full for one in old[path])
    gathered = _newest(one.record for one in [*alone, *loose])
    fresh = [r for cell, r in gathered.items() if cell not in held or r.age > held[cell].age]
    made = {_write(folder, lines) for lines in _shared_out(sorted(r.to_line() for r in fresh))}
    done.parts = sorted(full | made)
    held = _newest(one.record for path in done.parts for one in read_file(path))  # as the disk has it
    for one in alone:
        if one.record and _is_in(one.record, held):
            done.gathered += _take_away(folder, one, held)
    for path in old.keys() - full - made:
        if all(one.record and _is_in(one.record, held) for one in read_file(path)):
            path.unlink(missing_ok=True)
        else:
            done.parts.append(path)
    done.temporaries = _remove_temporaries(folder)
    return done


def _free(path: Path) -> bool:
    """Whether nobody else is at work on a file."""
    return not path.name.endswith(ASIDE) or abandoned(path)


def _full(path: Path, lines: list[Found]) -> bool:
    """Whether a part is left as it is: it is large, and as it would be written today."""
    large = sum(len(one.text) for one in lines) >= PART_BYTES // 2
    return large and all(one.record and one.record.to_line() == one.text + "\n" for one in lines)


def _newest(found: Iterable[Record | None]) -> dict[str, Record]:
    newest: dict[str, Record] = {}
    for record in found:
        if record and (record.cell_id not in newest or record.age > newest[record.cell_id].age):
            newest[record.cell_id] = record
    return newest


def _is_in(record: Record, held: dict[str, Record]) -> bool:
    """Whether the record, or a newer one of its cell, is held."""
    return record.cell_id in held and held[record.cell_id].age >= record.age


def _shared_out(lines: list[str]) -> list[str]:
    """The lines in texts of at most `PART_BYTES` each, or of one line."""
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
    """The part with this content, which its name says."""
    content = text.encode()
    path = parts_of(folder) / f"{hashlib.sha256(content).hexdigest()[:16]}{PART}"
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, text)
    return path


def _take_away(folder: Path, one: Found, held: dict[str, Record]) -> bool:
    """Remove a single file whose record is held, unless it has become another one meanwhile."""
    aside = one.path if one.path.name.endswith(ASIDE) else beside(one.path, ASIDE)
    try:
        one.path.replace(aside)
    except FileNotFoundError:  # somebody else gathers too
        return False
    now = [found.record for found in read_file(aside)]
    gone = all(record and _is_in(record, held) for record in now)
    if gone or _put_back(folder, aside, one):
        aside.unlink(missing_ok=True)
    return gone


def _put_back(folder: Path, aside: Path, one: Found) -> bool:
    """Give what was put aside a name again. Where that is taken by now, or cannot be given, it stays, and is
    read and gathered as it is."""
    try:
        os.link(aside, path_of(folder, one.record.cell_id) if one.record else one.path)
    except OSError:
        return False
    return True


def _remove_temporaries(folder: Path) -> int:
    removed = 0
    for path in list(folder.rglob(f".*{TEMPORARY}")):
        if abandoned(path):
            remove(path)
            removed += 1
    return removed
