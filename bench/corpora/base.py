"""The `Corpus` type, and the interface of the sources that provide corpora."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.inputs.errors import ConfigError
from bench.inputs.paths import user_path
from bench.inputs.printable import printable

Document = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.integer[Any]]
Text = bytes | Document

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1
"""Default share of the documents in each of validation and test."""


class CorpusError(ValueError):
    """A corpus is not available; the one-line message names the corpus, the reason and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # file names may contain newlines and control characters


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents by split, and the sha256 of the splits, lengths and contents in order.

    A document is bytes, or token ids if `ids` is given.
    """

    name: str
    train: Sequence[Document]
    validation: Sequence[Document]
    test: Sequence[Document]
    sha256: str = field(repr=False)
    published_test_words: int | None = None
    """Number of words in the test split as published by the data set's authors; None if not published."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Files and rows that were not read, by kind."""
    notes: tuple[str, ...] = ()
    """What a user should know about how the files were read."""
    ids: TokenIds | None = None
    """Properties of documents that are token ids; None if documents are bytes."""

    def split(self, name: str) -> Sequence[Document]:
        """Return the documents of the split `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @cached_property
    def train_stream(self) -> Document:
        """The training documents of bytes, concatenated, with a newline after each."""
        newline = np.frombuffer(b"\n", dtype=np.uint8)
        return np.concatenate([part for doc in self.train for part in (doc, newline)])

    def symbols(self, split: str) -> int:
        """Return the number of bytes, or of token ids, of a split."""
        documents = self.split(split)
        return documents.symbols if isinstance(documents, Slices) else sum(map(len, documents))

    def longest(self, split: str) -> int:
        """Return the length of the longest document of a split."""
        documents = self.split(split)
        return int(documents.lengths.max()) if isinstance(documents, Slices) else max(map(len, documents))

    def describe(self, what: str) -> str:
        """Return what was read, in a line that begins with `what`."""
        unit = "bytes" if self.ids is None else "token ids"
        sizes = []
        for split in SPLITS:
            count = len(self.split(split))
            documents = f"{count:,} document{'' if count == 1 else 's'}"
            sizes.append(f"{split} {self.symbols(split):,} {unit} in {documents}")
        skipped = [f"skipped {in_words(self.skipped)}"] if self.skipped else []
        return f"{what}: " + "; ".join([*sizes, *self.notes, *skipped])

    def too_short(self, seq_len: int, *, scored: str | None) -> str | None:
        """Return why there is too little text for windows of this length, or None;
        `scored` is the split to score, if any."""
        if (have := len(self.train_stream)) <= seq_len:
            return f"data={self.name} has {have:,} bytes to train on; seq_len={seq_len:,} needs more"
        if scored and (longest := self.longest(scored)) <= seq_len:
            return (
                f"data={self.name} has no {scored} document over {longest:,} bytes; "
                f"seq_len={seq_len:,} needs one"
            )
        return None

    def words_per_byte(self) -> float:
        """Words per byte of the test documents: a constant of the corpus that converts nats per byte into a
        word-level perplexity. Words are the published number if there is one, else whitespace-separated
        strings."""
        words = self.published_test_words or sum(len(doc.tobytes().split()) for doc in self.test)
        return words / self.symbols("test")

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """(256,) −ln p of each byte under the byte frequencies of the training documents,
        add-one smoothed."""
        counts = np.bincount(self.train_stream, minlength=256) + 1.0
        return np.asarray(-np.log(counts / counts.sum()), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """Properties of documents that are token ids."""

    most: int
    """The largest id of all documents."""
    separator: int | None
    """The id that stands between documents; no document contains it."""


class Slices(Sequence[Document]):
    """Documents that are slices of a few arrays, which may be memory-mapped; a slice copies nothing.

    Unlike a tuple of arrays, it takes 24 bytes a document in memory, or none if the bounds are memory-mapped.
    """

    def __init__(self, arrays: Sequence[Ids], bounds: npt.NDArray[np.int64]) -> None:
        """bounds (N, 3): the number of the array, and the first and the last place + 1 of each document."""
        self.arrays, self.bounds = arrays, bounds

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: Any) -> Any:
        """Return a document; for a slice, the documents as `Slices`."""
        if isinstance(index, slice):
            return Slices(self.arrays, self.bounds[index])
        array, start, stop = self.bounds[index].tolist()
        return self.arrays[array][start:stop]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(N,) the length of each document."""
        return np.asarray(self.bounds[:, 2] - self.bounds[:, 1])

    @property
    def symbols(self) -> int:
        """The sum of the lengths."""
        return int(self.lengths.sum())


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The knobs of `data` that a source may read, apart from the name. None means that the source chooses
    the value. `bench.tasks.text` states the meaning of each."""

    path: str | None = None
    max_bytes: int | None = None
    max_undecodable: float | None = None
    field: str | None = None
    split: str | None = None


def in_words(counts: Mapping[str, int]) -> str:
    """Return counts by kind as text: "2 hidden, 1 image"."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))


class Source(ABC):
    """The origin of one corpus. Each module of this package, except the shared ones, defines one source."""

    knobs: tuple[str, ...] = ()
    """Fields of `CorpusOptions` that this source reads; a value for any other field is an error."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def read(self, options: CorpusOptions) -> Corpus:
        """Read the corpus from local files only. Raises CorpusError."""

    def fetch(self, options: CorpusOptions) -> Path:
        """Download the corpus into the cache once, and return its path there. Raises CorpusError."""
        raise CorpusError(f"data={self.name}: there is nothing to fetch; it is read in place")

    def corpus(
        self,
        *,
        train: Sequence[Text],
        validation: Sequence[Text],
        test: Sequence[Text],
        published_test_words: int | None = None,
        skipped: Mapping[str, int] | None = None,
    ) -> Corpus:
        """Build the corpus from these documents, without the empty ones.
        Raises CorpusError for an empty split."""
        splits = {
            split: tuple(np.frombuffer(text, dtype=np.uint8) for text in documents if len(text))
            for split, documents in zip(SPLITS, (train, validation, test), strict=True)
        }
        for split, documents in splits.items():
            if not documents:
                raise CorpusError(f"data={self.name}: the {split} split is empty; the corpus is too small")
        return Corpus(
            name=self.name,
            train=splits["train"],
            validation=splits["validation"],
            test=splits["test"],
            sha256=_digest(splits),
            published_test_words=published_test_words,
            skipped=dict(skipped or {}),
        )

    def split_documents(
        self, documents: dict[str, bytes], skipped: Mapping[str, int] | None = None
    ) -> Corpus:
        """Assign documents to the splits by the hash of their contents.

        If there are fewer than ten documents, each document is divided between the splits by position
        instead."""
        documents = {key: text for key, text in documents.items() if text}
        if not documents:
            raise CorpusError(f"data={self.name}: the corpus is empty")
        if len(documents) < 10:  # too few to hold out whole documents: 80/10/10 of each, in order
            parts: list[list[bytes]] = [[], [], []]
            for text in documents.values():
                cut = round(len(text) * (1 - 2 * HELD_OUT_SHARE)), round(len(text) * (1 - HELD_OUT_SHARE))
                pieces = text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]
                for part, piece in zip(parts, pieces, strict=True):
                    part.append(piece)
            return self.corpus(train=parts[0], validation=parts[1], test=parts[2], skipped=skipped)
        order = sorted(documents, key=lambda key: sha256(documents[key]))
        held = max(1, round(len(order) * HELD_OUT_SHARE))
        return self.corpus(
            train=[documents[key] for key in sorted(order[2 * held :])],
            validation=[documents[key] for key in sorted(order[held : 2 * held])],
            test=[documents[key] for key in sorted(order[:held])],
            skipped=skipped,
        )


def cache_dir() -> Path:
    """Return the folder of fetched corpora: $LONGCTX_BENCH_CACHE, else the user's cache folder.

    Raises ConfigError if the home folder is needed but unknown.
    """
    variable = "LONGCTX_BENCH_CACHE"
    if folder := os.environ.get(variable):
        return user_path(variable, folder)
    import platformdirs

    try:
        return user_path(variable, str(platformdirs.user_cache_path("longctx-bench")))
    except RuntimeError:
        raise ConfigError(
            f"{variable}: not set, and the home folder is not known; set it to a folder"
        ) from None


def sha256(content: bytes) -> str:
    """Return the sha256 of the content in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _digest(splits: dict[str, tuple[Document, ...]]) -> str:
    digest = hashlib.sha256()
    for split, documents in splits.items():
        for text in documents:
            digest.update(f"{split}:{len(text)}:".encode())
            digest.update(text.data)
    return digest.hexdigest()
