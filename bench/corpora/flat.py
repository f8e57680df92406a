"""Documents of a user's files as slices of memory-mapped arrays, with an index in the cache.

A corpus of bytes or token ids may be larger than memory, and each cell of a sweep is a process of its own.
Therefore files are read once, in pieces: their documents are hashed, divided into splits and indexed. A cell
only maps the arrays into its memory. Files of ids are mapped where they are. The rows of tables (JSON lines,
Parquet) are first written to an array in the cache, because they cannot be mapped.

An index is found again by the path, size and date of each file, the knobs and the code of this package. A
file that is changed without a change of its size and date is not read again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.corpora import base, splits
from bench.corpora.base import SPLITS, Corpus, CorpusError, Ids, Slices, TokenIds, cache_dir
from bench.inputs.slow_work import SlowWork
from bench.records import atomic_writer, write_atomically

FOLDER = "documents"
"""Folder of the cache."""
CHUNK = 2**22
"""Symbols that are in memory at the same time."""
MOST_ID = 2**31 - 1


class ArrayFile(NamedTuple):
    """Symbols in a file: N of them, or N rows of W."""

    path: str
    dtype: str
    offset: int
    """Bytes before the first symbol."""
    shape: tuple[int, ...]
    """(N,) or (N, W)."""

    @property
    def symbols(self) -> int:
        """The number of symbols."""
        return int(np.prod(self.shape))

    def map(self) -> Ids:
        """(symbols,) the symbols, memory-mapped."""
        return np.memmap(self.path, np.dtype(self.dtype), "r", offset=self.offset, shape=(self.symbols,))

    def chunks(self, size: int) -> Iterator[Ids]:
        """Yield the symbols, `size` at a time. They are read, not mapped, so that the memory of one chunk is
        used."""
        dtype = np.dtype(self.dtype)
        for start in range(0, self.symbols, size):
            count = min(size, self.symbols - start)
            yield np.fromfile(self.path, dtype, count, offset=self.offset + start * dtype.itemsize)


class Indexer:
    """Collects documents in the order in which they are read."""

    def __init__(self, setting: str, store: BinaryIO | None, *, ids: bool, separator: int | None) -> None:
        """`store`: the file in the cache for documents that cannot be mapped in place. `ids`: whether
        documents are token ids; else they are bytes."""
        self.setting, self.store, self.ids, self.separator = setting, store, ids, separator
        self.arrays: list[ArrayFile] = []
        self.names: list[str] = []
        self.skipped: Counter[str] = Counter()
        self.notes: list[str] = []
        self.most = 0
        self._stored, self._dtype = 0, "|u1"
        self._places, self._own, self._digests = array("q"), array("q"), bytearray()

    def add(self, document: Ids, split: str) -> None:
        """Store a document of bytes or ids; each part between separators is a document of its own."""
        assert self.store is not None
        canonical = self._canonical(document)
        self._dtype = canonical.dtype.str
        self.store.write(canonical.data)
        self._place_parts(0, self._stored, canonical, split)
        self._stored += len(canonical)

    def index(self, file: ArrayFile, split: str) -> None:
        """Index the ids of a file in place; each row, and each part between separators, is a document."""
        number = len(self.arrays)
        self.arrays.append(file)
        what = f"{self.setting}: reading {Path(file.path).name}"
        with SlowWork(what, "ids", file.symbols) as work:
            if len(file.shape) == 2:
                self._index_rows(number, file, split, work)
            else:
                self._index_stream(number, file, split, work)

    def _index_rows(self, number: int, file: ArrayFile, split: str, work: SlowWork) -> None:
        width, place = file.shape[1], 0
        for chunk in file.chunks(max(1, CHUNK // max(1, width)) * width):
            canonical = self._canonical(chunk)
            for row in range(0, len(chunk), width):
                self._place_parts(number, place + row, canonical[row : row + width], split)
            place += len(chunk)
            work.advance(len(chunk))

    def _index_stream(self, number: int, file: ArrayFile, split: str, work: SlowWork) -> None:
        digest, start, place = hashlib.sha256(), 0, 0
        for chunk in file.chunks(CHUNK):
            canonical, begin = self._canonical(chunk), 0
            for end in self._separators(canonical):
                digest.update(canonical[begin:end].data)
                self._place(number, start, place + end - start, digest.digest(), split)
                digest, start, begin = hashlib.sha256(), place + end + 1, end + 1
            digest.update(canonical[begin:].data)
            place += len(chunk)
            work.advance(len(chunk))
        self._place(number, start, place - start, digest.digest(), split)

    def _place_parts(self, number: int, start: int, ids: Ids, split: str) -> None:
        """Place each part of a document between separators."""
        begin = 0
        for end in [*self._separators(ids), len(ids)]:
            part = ids[begin:end]
            self._place(number, start + begin, len(part), hashlib.sha256(part.data).digest(), split)
            begin = end + 1

    def _separators(self, ids: Ids) -> list[int]:
        found = [] if self.separator is None else np.flatnonzero(ids == self.separator).tolist()
        return [int(place) for place in found]

    def _canonical(self, document: Ids) -> Ids:
        """Return the symbols in the form that is stored and hashed: bytes, or ids of 32 bits."""
        if not self.ids:
            return document
        if len(document):
            least, most = int(document.min()), int(document.max())
            if least < 0 or most > MOST_ID:
                bad = least if least < 0 else most
                raise CorpusError(f"{self.setting}: holds the id {bad}; allowed are 0 to {MOST_ID:,}")
            self.most = max(self.most, most)
        return np.ascontiguousarray(document.astype("<u4"))

    def _place(self, number: int, start: int, length: int, digest: bytes, split: str) -> None:
        if not length:
            return
        if split not in self.names:
            self.names.append(split)
        self._places.extend((number, start, start + length))
        self._own.append(self.names.index(split))
        self._digests += digest

    def divided(self) -> tuple[npt.NDArray[np.int64], list[int], str]:
        """Return the bounds (M, 3) of the documents of all splits, in their order, the number of documents of
        each split, and the hash of the corpus."""
        if not self._own:
            raise CorpusError(f"{self.setting}: the corpus is empty")
        places = np.frombuffer(self._places, dtype=np.int64).reshape(-1, 3)
        digests = np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, 32)
        hashes = digests[:, :8].copy().view(">u8")[:, 0] / 2.0**64
        own = np.frombuffer(self._own, dtype=np.int64)
        lengths = places[:, 2] - places[:, 1]
        pieces, ignored, note = splits.divide(self.names, own, lengths, hashes, self.setting)
        self.skipped.update(ignored)
        self.notes.append(note)
        code, document, start, stop = pieces.T
        offset = places[document, 1]
        bounds = np.stack([places[document, 0], offset + start, offset + stop], axis=1)
        digest = hashlib.sha256(lengths.astype("<i8").tobytes() + digests.tobytes())
        digest.update(pieces.astype("<i8").tobytes())
        return bounds, [int((code == k).sum()) for k in range(len(SPLITS))], digest.hexdigest()

    def stored(self, path: Path) -> list[ArrayFile]:
        """Return the arrays, the first of which is the file of stored documents if there are any."""
        return [ArrayFile(str(path), self._dtype, 0, (self._stored,))] if self._stored else self.arrays


def load(
    name: str,
    setting: str,
    files: Sequence[Path],
    decides: Sequence[Any],
    build: functools.partial[None],
    *,
    separator: int | None = None,
    ids: bool = False,
    stores: bool,
    modules: Sequence[ModuleType],
) -> Corpus:
    """Return the corpus of these files from the cache; `build`, a partial
    function, reads them into an indexer if it is not there.

    `decides`: other values on which the documents depend. `modules`: those whose code `build` uses.
    `stores`: whether it stores documents. Raises CorpusError.
    """
    used = (base, splits, sys.modules[__name__], sys.modules[build.func.__module__], *modules)
    key = _key(name, setting, files, [*decides, separator, _code(used)])
    place = cache_dir() / FOLDER / key
    data, bounds, summary = (place.with_suffix(suffix) for suffix in (".bin", ".npy", ".json"))
    try:
        if not summary.is_file():
            make = functools.partial(Indexer, setting, ids=ids, separator=separator)
            _build(build, make, stores, (data, bounds, summary))
        known = json.loads(summary.read_text())
        arrays = [
            ArrayFile(path, dtype, offset, tuple(shape)).map()
            for path, dtype, offset, shape in known["arrays"]
        ]
        slices = Slices(arrays, np.load(bounds, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        raise CorpusError(
            f"{setting}: cannot use the cache {place.parent}: {error.strerror or error}"
        ) from None
    ends = np.cumsum(known["counts"]).tolist()
    parts = [slices[start:stop] for start, stop in zip([0, *ends], ends, strict=False)]
    return Corpus(
        name=name,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        sha256=known["sha256"],
        skipped=known["skipped"],
        notes=tuple(known["notes"]),
        ids=TokenIds(most=known["most"], separator=separator) if ids else None,
    )


def _build(
    build: Callable[[Indexer], None],
    make: Callable[[BinaryIO | None], Indexer],
    stores: bool,
    places: tuple[Path, Path, Path],
) -> None:
    """Read the documents, and write the index and the stored documents into the cache."""
    data, bounds, summary = places
    with atomic_writer(data) if stores else contextlib.nullcontext() as store:
        indexer = make(store)
        build(indexer)
        found, counts, digest = indexer.divided()
    with atomic_writer(bounds) as file:
        np.save(file, found, allow_pickle=False)
    known = {
        "arrays": indexer.stored(data),
        "counts": counts,
        "sha256": digest,
        "most": indexer.most,
        "skipped": dict(+indexer.skipped),
        "notes": indexer.notes,
    }
    write_atomically(summary, json.dumps(known))  # last: an index without it is not complete


def _code(modules: Sequence[ModuleType]) -> str:
    """Return the hash of the code of modules."""
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()


def _key(name: str, setting: str, files: Sequence[Path], decides: Sequence[Any]) -> str:
    """Return the name of the index in the cache."""
    try:
        stats = [(str(file.resolve()), file.stat()) for file in files]
    except OSError as error:
        raise CorpusError(f"{setting}: {error.filename}: {error.strerror}") from None
    known = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats]
    text = json.dumps([name, known, list(decides)])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:32]
