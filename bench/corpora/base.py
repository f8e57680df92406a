"""What a corpus is, and how a source gives one."""

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
import platformdirs

from bench.inputs.errors import ConfigError
from bench.inputs.paths import user_path
from bench.inputs.printable import printable

Document = npt.NDArray[np.uint8]
Text = bytes | Document

SPLITS = ("train", "validation", "test")
HELD_OUT_SHARE = 0.1
"""Share of the documents in each of validation and test (where a corpus does not say otherwise)."""


class CorpusError(ValueError):
    """A corpus that cannot be had; the message, on one line, says which, why, and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # names of files may hold line ends, and worse


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents by split, and the sha256 over splits, lengths and contents in order."""

    name: str
    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    sha256: str = field(repr=False)
    published_test_words: int | None = None
    """Words of the test split as the data set's authors count them, where they say."""

    def split(self, name: str) -> tuple[Document, ...]:
        """The documents of train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @cached_property
    def train_stream(self) -> Document:
        """The training documents end to end, a newline between them."""
        newline = np.frombuffer(b"\n", dtype=np.uint8)
        return np.concatenate([part for doc in self.train for part in (doc, newline)])

    def words_per_byte(self) -> float:
        """Words per byte of the test documents, a constant of the corpus that turns nats per byte into a
        word-level perplexity: by the published number of words, else of whitespace-separated ones."""
        words = self.published_test_words or sum(len(doc.tobytes().split()) for doc in self.test)
        return words / sum(map(len, self.test))

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """(256,) −ln p of each byte under the training documents' frequencies, add-one smoothed."""
        counts = np.bincount(self.train_stream, minlength=256) + 1.0
        return np.asarray(-np.log(counts / counts.sum()), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a source: the knobs of `data` beside the name. None leaves one to the source."""

    path: str | None = None
    """A file, folder or glob of the user's."""
    max_bytes: int | None = None
    """Most bytes of training documents."""


class Source(ABC):
    """Where the corpus of one name comes from; a module of this package that is not shared defines one."""

    knobs: tuple[str, ...] = ()
    """Fields of `Wanted` that it reads; the others are refused."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def read(self, wanted: Wanted) -> Corpus:
        """The corpus, from this machine alone. Raises CorpusError."""

    def fetch(self, wanted: Wanted) -> Path:
        """Bring the corpus into the cache, once, and say where it lies there. Raises CorpusError."""
        raise CorpusError(f"data={self.name}: there is nothing to fetch, it is read where it lies")

    def corpus(
        self,
        *,
        train: Sequence[Text],
        validation: Sequence[Text],
        test: Sequence[Text],
        published_test_words: int | None = None,
    ) -> Corpus:
        """The corpus of these documents, the empty ones left out. Raises CorpusError for an empty split."""
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

    def deal(self, documents: dict[str, bytes]) -> Corpus:
        """Documents by name dealt to the splits by the hash of their contents; a few are cut by position
        instead."""
        documents = {key: text for key, text in documents.items() if text}
        if not documents:
            raise CorpusError(f"data={self.name}: the corpus is empty")
        if len(documents) < 10:  # too few to hold whole ones out: 80/10/10 of each, in order
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
    """Where fetched corpora are kept: $LONGCTX_BENCH_CACHE, else the user's cache folder.

    Raises checks.ConfigError where the home folder is needed and not known.
    """
    variable = "LONGCTX_BENCH_CACHE"
    if wanted := os.environ.get(variable):
        return user_path(variable, wanted)
    try:
        return user_path(variable, str(platformdirs.user_cache_path("longctx-bench")))
    except RuntimeError:
        raise ConfigError(f"{variable}: not set, and the home folder is not known; give a folder") from None


def sha256(content: bytes) -> str:
    """Its sha256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _digest(splits: dict[str, tuple[Document, ...]]) -> str:
    digest = hashlib.sha256()
    for split, documents in splits.items():
        for text in documents:
            digest.update(f"{split}:{len(text)}:".encode())
            digest.update(text.data)
    return digest.hexdigest()
