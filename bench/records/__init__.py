"""Records: what one cell says, kept in files and read back.

One flat JSON file a cell, written atomically; many of them may be gathered into a part with a line each
(`python -m bench.records compact`). Importing this package brings neither torch nor pandas, so that the
report and the command line start fast.
"""

from __future__ import annotations

from bench.records.files import (
    CURVES_DIR,
    RECORDS_DIR,
    curve_path_of,
    make_folder,
    path_of,
    replacing,
    share,
    tidy,
    unfinished,
    write_atomically,
)
from bench.records.migrations import SCHEMA_VERSION
from bench.records.reading import RecordError, parse
from bench.records.record import FINAL, KEYS, STATUSES, Record, Status, Tell
from bench.records.store import Sequence, columns_of, frame_of, load, read, read_all, write

__all__ = [
    "CURVES_DIR",
    "FINAL",
    "KEYS",
    "RECORDS_DIR",
    "SCHEMA_VERSION",
    "STATUSES",
    "Record",
    "RecordError",
    "Sequence",
    "Status",
    "Tell",
    "columns_of",
    "curve_path_of",
    "frame_of",
    "load",
    "make_folder",
    "parse",
    "path_of",
    "read",
    "read_all",
    "replacing",
    "share",
    "tidy",
    "unfinished",
    "write",
    "write_atomically",
]
