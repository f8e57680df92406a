"""A corpus as the tokens that a model reads: bytes, tokens of text, or token ids of a user.

Bits per byte need the bytes of each token. They are known exactly for bytes and tokens of text, and for token
ids only if their tokenizer is given.

Shapes: N tokens of a text, V entries of the vocabulary without the mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.corpora import Corpus, Document
from bench.corpora.base import SPLITS, Ids, Slices, in_words
from bench.corpora.tokens import TextTokenizer, TokenText

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Stream(Protocol):
    """A long sequence of tokens, of which parts are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Ids: ...


class Reading(ABC):
    """The tokens of a corpus."""

    corpus: Corpus
    tokenizer: TextTokenizer | None
    """None reads bytes, or ids whose bytes are not known."""
    size: int
    """V."""
    sha256: str
    """Hash of the corpus as these tokens."""
    knows_bytes: bool
    """Whether the bytes of each token are known."""
    train: Stream
    """The training documents, one after the other."""

    @abstractmethod
    def documents(self, split: str) -> Sequence[Ids]:
        """Return the tokens of the documents of a split."""

    @abstractmethod
    def scored(self, split: str, seq_len: int, at_most: int) -> list[TokenText]:
        """Return the tokens of the scored part of each document of a split; the last is never an input."""

    @abstractmethod
    def unigram_nats(self) -> Floats:
        """(V,) −ln p of each token under the frequencies of the training tokens, add-one smoothed."""

    @abstractmethod
    def words_per_byte(self) -> float | None:
        """Return the words per byte of the test documents; None if the words are not known."""

    @abstractmethod
    def train_text(self, starts: Ints, length: int) -> list[Document]:
        """Return the bytes of the windows of `length` training tokens from these places on, as parts of the
        training documents. Bytes of several windows are returned once, in one part."""

    @abstractmethod
    def text(self, scored: TokenText, start: int, stop: int) -> Document:
        """Return the bytes of tokens [start, stop) of a scored text."""

    @abstractmethod
    def too_short(self, seq_len: int, split: str | None) -> str | None:
        """Return why the corpus is too short for windows of this length, or None; `split` is the split to
        score, if any."""

    def figures(self) -> dict[str, Any]:
        """Return how much data there is, by record key."""
        corpus = self.corpus
        return {
            "data_documents": sum(len(corpus.split(split)) for split in SPLITS),
            "data_bytes": sum(map(corpus.symbols, SPLITS)) if corpus.ids is None else None,
            "data_skipped": in_words(corpus.skipped) or None,
        }

    def describe(self) -> str:
        """Return what was read, in words."""
        corpus, unit = self.corpus, "bytes" if self.corpus.ids is None else "token ids"
        sizes = [
            f"{split} {corpus.symbols(split):,} {unit} in {len(corpus.split(split)):,} documents"
            for split in SPLITS
        ]
        skipped = [f"skipped {in_words(corpus.skipped)}"] if corpus.skipped else []
        return "; ".join([*sizes, *corpus.notes, *skipped])

    @abstractmethod
    def prepare(self) -> int:
        """Compute what is slow and cached, so that no cell has to; returns the number of training tokens."""


def smoothed_nats(counts: Ints) -> Floats:
    """(V,) −ln p of frequencies, add-one smoothed."""
    smoothed = counts + 1.0
    return np.asarray(-np.log(smoothed / smoothed.sum()), dtype=np.float64)


def united(first: Ints, last: Ints) -> list[tuple[int, int]]:
    """Return the union of the intervals [first, last), sorted; first and last are ascending."""
    begins = np.flatnonzero(np.append(True, first[1:] >= last[:-1]))
    ends = np.append(begins[1:], len(first)) - 1
    return list(zip(first[begins].tolist(), last[ends].tolist(), strict=True))


def too_short(corpus: Corpus, seq_len: int, *, scored: str | None, unit: str, have: int) -> str | None:
    """Return why a corpus is too short for windows of this length, or None; `scored` is the split to score,
    if any, and `have` the number of symbols to train on."""
    if have <= seq_len:
        return f"data={corpus.name} has {have:,} {unit} to train on; seq_len={seq_len:,} needs more"
    if scored and (longest := longest_of(corpus.split(scored))) <= seq_len:
        return (
            f"data={corpus.name} has no {scored} document over {longest:,} {unit}; "
            f"seq_len={seq_len:,} needs one"
        )
    return None


def longest_of(documents: Sequence[Document]) -> int:
    """Return the length of the longest document."""
    return int(documents.lengths.max()) if isinstance(documents, Slices) else max(map(len, documents))
