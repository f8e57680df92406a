"""Texts in the rows of a user's tables; each row is one document."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from bench.corpora import disk, flat, hub_rows, table_files
from bench.corpora.base import Corpus, CorpusError, CorpusOptions, Source
from bench.corpora.flat import Indexer
from bench.corpora.splits import SYNONYMS
from bench.corpora.table_files import Tables, columns, find
from bench.inputs.slow_work import SlowWork

if TYPE_CHECKING:
    import pyarrow as pa

FIELD = "text"
"""Column of the texts if `data.field` is not set."""


class Rows(Source):
    """JSON lines, Parquet, Arrow or CSV files, or a folder of `datasets.save_to_disk` or of the hub's cache.

    The splits are those of the data. `data.split` reads one of them; what is missing of validation and test
    is held out by the hash of each document (`bench.corpora.splits`). Rows without text are skipped.
    """

    knobs = ("path", "field", "split", "max_bytes")

    def read(self, options: CorpusOptions) -> Corpus:
        if not options.path:
            raise CorpusError(
                f"data={self.name}: data.path is missing; give a file, folder or glob of JSON lines, "
                "Parquet, Arrow or CSV, or a folder of datasets.save_to_disk"
            )
        setting = f"data.path={options.path}"
        tables = find(options.path, setting)
        return flat.load(
            self.name,
            setting,
            tables.files,
            [options.field, options.split, options.max_bytes],
            functools.partial(_index, tables, options, setting),
            modules=(table_files, hub_rows, disk),
            stores=True,
        )


def _index(tables: Tables, options: CorpusOptions, setting: str, indexer: Indexer) -> None:
    """Store the texts."""
    field = options.field or FIELD
    indexer.skipped.update(tables.skipped)
    with (
        SlowWork(f"{setting}: reading column {field}", "bytes") as work,
        columns(tables, field, options.split, setting) as splits,
    ):
        for split, batches in splits.items():
            trains = len(splits) == 1 or SYNONYMS.get(split) == "train"
            texts = (text for values in batches for text in _texts(values, field, setting))
            for text in _first_bytes(options.max_bytes if trains else None, texts):
                indexer.skipped.update(["row without text"] if not text else [])
                indexer.add(np.frombuffer(text, dtype=np.uint8), split)
                work.advance(len(text))


def _first_bytes(at_most: int | None, texts: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the first `at_most` bytes of the texts; the last text is truncated to fit."""
    left = at_most
    for text in texts:
        if left is None:
            yield text
        else:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def _texts(values: pa.ChunkedArray, field: str, setting: str) -> list[bytes]:
    """Return the values of a column as UTF-8; b"" for null. Raises CorpusError for another type."""
    import pyarrow as pa

    if isinstance(values, pa.Array):
        values = pa.chunked_array([values])
    kind = values.type
    if pa.types.is_null(kind):
        return [b""] * len(values)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        raise CorpusError(f"{setting}: data.field={field}: holds {kind}; data=ids reads token ids")
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not is_text and not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise CorpusError(f"{setting}: data.field={field}: holds {kind}; expected text")
    found = chain.from_iterable(chunk.to_pylist() for chunk in values.chunks)
    return [value.encode() if isinstance(value, str) else value or b"" for value in found]
