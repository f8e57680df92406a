"""Token ids that a user has already computed: `.bin`, `.npy`, or lists in the rows of tables."""

from __future__ import annotations

import functools
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.corpora import disk, flat, hub_rows, table_files
from bench.corpora.base import Corpus, CorpusError, Ids, Slices
from bench.corpora.disk import expand, file_type, files_at, open_file
from bench.corpora.flat import ArrayFile, Indexer
from bench.corpora.splits import SYNONYMS, chosen
from bench.corpora.table_files import Tables, columns, find, format_of
from bench.inputs.paths import user_path
from bench.inputs.slow_work import SlowWork

if TYPE_CHECKING:
    import pyarrow as pa

FIELD = "input_ids"
"""Column of the ids if `data.field` is not set, as tokenizers of the hub name it."""
ARRAYS = (".bin", ".npy")
HEADER_BYTES = 1024
HEADERS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}
"""Magic number and version of the header of llm.c's `.bin` files (dev/data/data_common.py) → dtype. The
header is 256 integers of 32 bits, the third of which is the number of tokens."""
LOOKED_AT = 2**16
"""Ids at the beginning of a file in which a wrong dtype is looked for."""


class TokenFiles(NamedTuple):
    """Arrays of ids by split."""

    by_split: dict[str, list[Path]]
    skipped: Counter[str]


class Options(NamedTuple):
    """The knobs of `data` that decide which ids are read; see `bench.tasks.ids`."""

    path: str | None
    field: str | None
    split: str | None
    dtype: str | None
    separator: int | None


@lru_cache(maxsize=4)
def load(name: str, options: Options) -> Corpus:
    """Load the documents of `data=name`; they are memory-mapped, files of ids where they are.

    A row of a table, or of a two-dimensional array, is one document; a separator divides ids into documents.
    The splits are those in the names of the files (train.bin, val.bin), or those of the table; what is
    missing is held out (`bench.corpora.splits`). Raises CorpusError.
    """
    if not options.path:
        raise CorpusError(
            f"data={name}: data.path is missing; give a file, folder or glob of .bin, .npy, or tables with "
            "lists of ids"
        )
    setting = f"data.path={options.path}"
    arrays = _arrays(options.path, setting)
    if arrays is None:
        tables = find(options.path, setting)
        _refuse(setting, "data.dtype", options.dtype, "a table has the type of its ids")
        return flat.load(
            name,
            setting,
            tables.files,
            [options.field, options.split],
            functools.partial(_index_tables, tables, options, setting),
            separator=options.separator,
            ids=True,
            stores=True,
            modules=(table_files, hub_rows, disk),
        )
    _refuse(setting, "data.field", options.field, ".bin and .npy have no columns")
    splits = chosen(list(arrays.by_split), options.split, setting)
    return flat.load(
        name,
        setting,
        [file for split in splits for file in arrays.by_split[split]],
        [options.dtype, splits],
        functools.partial(_index_arrays, arrays, splits, options.dtype, setting),
        separator=options.separator,
        ids=True,
        stores=False,
        modules=(disk,),
    )


class Joined:
    """Documents of token ids as one stream, which copies only the parts that are read.

    Documents that follow each other in their array are one run, with the separators between them.
    """

    def __init__(self, documents: Slices, separator: int | None) -> None:
        """`separator`: an id that follows each document, if any."""
        self.separator, between = separator, int(separator is not None)
        array, start, stop = np.asarray(documents.bounds).T
        follows = (array[1:] == array[:-1]) & (start[1:] == stop[:-1] + between)
        first, last = np.append(True, ~follows), np.append(~follows, True)
        self.runs = Slices(documents.arrays, np.stack([array[first], start[first], stop[last]], axis=1))
        self.ends = np.cumsum(self.runs.lengths + between)
        """(R,) the end of each run, with the separator after it."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> Ids:
        start, stop, _ = part.indices(len(self))
        parts: list[Ids] = []
        index = int(np.searchsorted(self.ends, start, side="right"))
        begin = int(self.ends[index - 1]) if index else 0
        while begin < stop:
            run: Ids = self.runs[index]
            parts.append(run[max(0, start - begin) : stop - begin].astype(np.int64))
            begin, index = int(self.ends[index]), index + 1
            if self.separator is not None and start < begin <= stop:
                parts.append(np.array([self.separator]))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _refuse(setting: str, knob: str, value: str | None, reason: str) -> None:
    if value is not None:
        raise CorpusError(f"{setting}: {knob}={value}: {reason}; leave it out")


def _arrays(text: str, setting: str) -> TokenFiles | None:
    """Return the `.bin` and `.npy` files at a file, folder or glob; None if there are none.
    Raises CorpusError for those beside tables, and for names of which only some say a split."""
    path = user_path("data.path", text)
    if file_type(path, setting) is None and not any(expand(str(path), setting)):
        return None  # the reader of tables says so
    found, skipped = files_at(path, setting)
    arrays = [file for file in found if file.suffix in ARRAYS]
    if not arrays:
        return None
    if tables := [file for file in found if format_of(file) and file.name not in table_files.METADATA]:
        raise CorpusError(f"{setting}: has {arrays[0].name} and {tables[0].name}; choose one kind by a glob")
    skipped.update(file.suffix or "without suffix" for file in found if file not in set(arrays))
    if len(arrays) == 1:
        return TokenFiles({"train": arrays}, skipped)
    by_split: dict[str, list[Path]] = {}
    for file in arrays:
        by_split.setdefault(_split_of(file), []).append(file)
    if "" in by_split and len(by_split) > 1:
        unknown = by_split[""][0].name
        raise CorpusError(
            f"{setting}: the name of {unknown} says no split, others do; allowed are names with train, val "
            "or test, or none of them; or choose files by a glob"
        )
    return TokenFiles({name or "train": own for name, own in by_split.items()}, skipped)


def _split_of(file: Path) -> str:
    """Return the split that the name of a file says, or ""."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SYNONYMS[word] for word in words if word in SYNONYMS), "")


def _index_arrays(
    arrays: TokenFiles, splits: list[str], dtype: str | None, setting: str, indexer: Indexer
) -> None:
    indexer.skipped.update(arrays.skipped)
    for split in splits:
        for file in arrays.by_split[split]:
            read = _npy if file.suffix == ".npy" else _bin
            indexer.index(read(file, dtype, setting, indexer), split)


def _npy(file: Path, dtype: str | None, setting: str, indexer: Indexer) -> ArrayFile:
    """Return where the ids of a NumPy file are. Raises CorpusError."""
    _refuse(setting, "data.dtype", dtype, f"{file.name} says its own")
    with open_file(file, setting):
        pass  # anything but a readable file is refused
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = hub_rows.first_line(error)
        raise CorpusError(f"{setting}: {file.name} is not an array of numbers ({reason})") from None
    if not isinstance(array, np.memmap) or array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise CorpusError(
            f"{setting}: {file.name} holds {array.dtype} of {array.ndim} dimensions; allowed are integers of "
            "1, or of 2, whose rows are documents"
        )
    if not array.flags.c_contiguous:
        raise CorpusError(f"{setting}: {file.name} is in Fortran order; save numpy.ascontiguousarray of it")
    return ArrayFile(str(file), array.dtype.str, int(array.offset), array.shape)


def _bin(file: Path, dtype: str | None, setting: str, indexer: Indexer) -> ArrayFile:
    """Return where the ids of a raw file are: after a header of llm.c, or from the beginning.
    Raises CorpusError."""
    with open_file(file, setting) as opened:
        head = opened.read(max(HEADER_BYTES, 4 * LOOKED_AT))
        size = opened.seek(0, 2)
    header = np.frombuffer(head[:12], dtype="<i4") if len(head) >= HEADER_BYTES else np.zeros(3, dtype="<i4")
    magic, version, count = header.tolist()
    named = HEADERS.get((magic, version))
    if named and HEADER_BYTES + count * np.dtype(named).itemsize == size:
        if dtype not in (None, named):
            raise CorpusError(f"{setting}: data.dtype={dtype}: the header of {file.name} says {named}")
        indexer.notes.append(f"{file.name} has a header of llm.c: {count:,} ids of {named}")
        return ArrayFile(str(file), f"<{np.dtype(named).str[1:]}", HEADER_BYTES, (count,))
    if dtype is None:
        raise CorpusError(
            f"{setting}: data.dtype is missing: {file.name} has no header; allowed are uint16, which nanoGPT "
            "writes, and uint32"
        )
    number = np.dtype(dtype).newbyteorder("<")
    if size % number.itemsize:
        raise CorpusError(f"{setting}: {file.name} has {size:,} bytes, which is no multiple of {dtype}")
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    if dtype == "uint16" and len(halves) >= 64 and not halves[1::2].any():
        raise CorpusError(
            f"{setting}: data.dtype=uint16: every second id of {file.name} is 0; its ids seem to be uint32"
        )
    return ArrayFile(str(file), number.str, 0, (size // number.itemsize,))


def _index_tables(tables: Tables, options: Options, setting: str, indexer: Indexer) -> None:
    field = options.field or FIELD
    indexer.skipped.update(tables.skipped)
    with (
        SlowWork(f"{setting}: reading column {field}", "ids") as work,
        columns(tables, field, options.split, setting) as splits,
    ):
        for split, batches in splits.items():
            for values in batches:
                for row in _lists(values, field, setting):
                    indexer.skipped.update(["row without ids"] if not len(row) else [])
                    indexer.add(row, split)
                    work.advance(len(row))


def _lists(values: pa.Array | pa.ChunkedArray, field: str, setting: str) -> list[Ids]:
    """Return the rows of a column as arrays of ids; null is an empty one. Raises CorpusError for another
    type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = whole.type
    if pa.types.is_null(kind) or not len(whole):
        return [np.zeros(0, dtype=np.int64)] * len(whole)
    is_list = any(is_one(kind) for is_one in (pa.types.is_list, pa.types.is_large_list))
    if not (is_list or pa.types.is_fixed_size_list(kind)) or not pa.types.is_integer(kind.value_type):
        text = "; data=rows reads text" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else ""
        raise CorpusError(f"{setting}: data.field={field}: holds {kind}; expected lists of integers{text}")
    lengths = pc.fill_null(pc.list_value_length(whole), 0).to_numpy(zero_copy_only=False)
    flat_values = whole.flatten()
    if flat_values.null_count:
        raise CorpusError(f"{setting}: data.field={field}: a list has a null in place of an id")
    ends = np.cumsum(lengths)
    return np.split(flat_values.to_numpy(zero_copy_only=False), ends[:-1])
