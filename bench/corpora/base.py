"""The `Corpus` type, and the interface of the sources that provide corpora."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.inputs.errors import ConfigError
from bench.inputs.paths import user_path
from bench.inputs.printable import printable

Document = npt.NDArray[np.uint8]
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
    """Documents by split, and the sha256 of the splits, lengths and contents in order."""

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    sha256: str = field(repr=False)
    published_test_words: int | None = None
    """Number of words in the test split as published by the data set's authors; None if not published."""

    def split(self, name: str) -> tuple[Document, ...]:
        """Return the documents of the split `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @cached_property
    def train_stream(self) -> Document:
        """The training documents, concatenated, with a newline after each."""
        newline = np.frombuffer(b"\n", dtype=np.uint8)
        return np.concatenate([part for doc in self.train for part in (doc, newline)])

    def words_per_byte(self) -> float:
        """Words per byte of the test documents: a constant of the corpus that converts nats per byte into a
        word-level perplexity. Words are the published number if there is one, else whitespace-separated
        strings."""
        words = self.published_test_words or sum(len(doc.tobytes().split()) for doc in self.test)
        return words / sum(map(len, self.test))

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """(256,) −ln p of each byte under the byte frequencies of the training documents,
        add-one smoothed."""
        counts = np.bincount(self.train_stream, minlength=256) + 1.0
        return np.asarray(-np.log(counts / counts.sum()), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class CorpusOptions:
    """The knobs of `data` apart from the name. None means that the source chooses the value."""

    path: str | None = None
    """A file, folder or glob that the user gives."""
    max_bytes: int | None = None
    """Maximum number of bytes of training documents."""


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
            sha256=_digest(splits),
            published_test_words=published_test_words,
            **splits,
        )

    def split_documents(self, documents: dict[str, bytes]) -> Corpus:
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
            return self.corpus(train=parts[0], validation=parts[1], test=parts[2])
        order = sorted(documents, key=lambda key: sha256(documents[key]))
        held = max(1, round(len(order) * HELD_OUT_SHARE))
        return self.corpus(
            train=[documents[key] for key in sorted(order[2 * held :])],
            validation=[documents[key] for key in sorted(order[held : 2 * held])],
            test=[documents[key] for key in sorted(order[:held])],
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
