"""Records: the results of cells, stored in files and read back.

Each cell has one flat JSON file, which is written atomically. `python -m bench.records compact` combines many
of them into a part, a file with one record per line. Importing this package imports neither torch nor pandas,
so that the report and the command line start fast.
"""

from __future__ import annotations

from bench.records.files import (
    CURVES_DIR,
    PROFILES_DIR,
    RECORDS_DIR,
    atomic_writer,
    curve_path_of,
    make_folder,
    path_of,
    profile_path_of,
    remove_abandoned,
    share_with_group,
    temporary_files_of,
    write_atomically,
)
from bench.records.migrations import SCHEMA_VERSION
from bench.records.reading import RecordError, parse
from bench.records.record import FINAL, KEYS, NOT_COMPILED, STATUSES, Record, Report, Status
from bench.records.store import SequenceNumbers, columns_of, frame_of, load, read, read_all, write

__all__ = [
    "CURVES_DIR",
    "FINAL",
    "KEYS",
    "NOT_COMPILED",
    "PROFILES_DIR",
    "RECORDS_DIR",
    "SCHEMA_VERSION",
    "STATUSES",
    "Record",
    "RecordError",
    "Report",
    "SequenceNumbers",
    "Status",
    "atomic_writer",
    "columns_of",
    "curve_path_of",
    "frame_of",
    "load",
    "make_folder",
    "parse",
    "path_of",
    "profile_path_of",
    "read",
    "read_all",
    "remove_abandoned",
    "share_with_group",
    "temporary_files_of",
    "write",
    "write_atomically",
]
