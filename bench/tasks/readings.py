"""A corpus as the tokens that a model reads: bytes, tokens of text, or token ids of a user.

Bits per byte need the bytes of each token. They are known exactly for bytes and tokens of text, and for token
ids only if their tokenizer is given.

Shapes: N tokens of a text, V entries of the vocabulary without the mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.corpora import Corpus, CorpusError, Document, tokens
from bench.corpora.base import Ids, Slices, TokenIds
from bench.corpora.tokens import TextTokenizer, TokenText
from bench.inputs.slow_work import SlowWork
from bench.tasks.windows import scored_counts

BYTES = 256
CHUNK = 2**22
"""Token ids that are counted at the same time."""
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

    @abstractmethod
    def prepare(self) -> int:
        """Compute what is slow and cached, so that no cell has to; returns the number of training tokens."""


def of(corpus: Corpus, tokenizer: TextTokenizer | None, bpe: int | None, vocab_size: int | None) -> Reading:
    """Return the reading of a corpus by the knobs of `data`. Raises CorpusError."""
    if corpus.ids is None:
        if bpe is not None:
            return TextReading(corpus, tokens.trained(corpus, bpe), size=bpe)
        return TextReading(corpus, tokenizer, size=tokenizer.size if tokenizer else BYTES)
    if bpe is not None:
        raise CorpusError(f"data.bpe={bpe}: data={corpus.name} has token ids already; leave it out")
    return IdReading(corpus, corpus.ids, tokenizer, vocab_size)


class TextReading(Reading):
    """Documents of bytes, as bytes or as tokens.

    The scored bytes of a document do not depend on its tokens: the part to score is counted in bytes, and the
    first byte, which no causal model predicts, is a token of its own.
    """

    knows_bytes = True

    def __init__(self, corpus: Corpus, tokenizer: TextTokenizer | None, *, size: int) -> None:
        self.corpus, self.tokenizer, self.size = corpus, tokenizer, size
        self.sha256 = corpus.sha256 if tokenizer is None else tokenizer.identity(corpus)

    @cached_property
    def train(self) -> Ids:  # type: ignore[override]  # a cached property in place of an attribute
        """The training documents with a newline after each."""
        return self._train_tokens.ids

    @cached_property
    def _train_tokens(self) -> TokenText:
        return self._tokens(self.corpus.train_stream)

    def _tokens(self, text: Document) -> TokenText:
        return TokenText(text) if self.tokenizer is None else tokens.encoded(self.tokenizer, text)

    def documents(self, split: str) -> Sequence[Ids]:
        """The documents, encoded as a whole."""
        return [self._tokens(document).ids for document in self.corpus.split(split)]

    def scored(self, split: str, seq_len: int, at_most: int) -> list[TokenText]:
        """`at_most` counts bytes."""
        documents = self.corpus.split(split)
        counts = scored_counts([len(document) - 1 for document in documents], seq_len, at_most)
        pairs = zip(documents, counts, strict=True)
        return [_first_apart(document[: count + 1], self.tokenizer) for document, count in pairs]

    def unigram_nats(self) -> Floats:
        """Of bytes or of tokens."""
        if self.tokenizer is None:
            return self.corpus.unigram_nats()
        return _nats(np.bincount(self.train, minlength=self.size))

    def words_per_byte(self) -> float:
        """That of the corpus."""
        return self.corpus.words_per_byte()

    def train_text(self, starts: Ints, length: int) -> list[Document]:
        """Slices of the training documents."""
        text, windows = self._train_tokens, np.unique(starts)
        first, last = text.begin(windows), text.begin(windows + length)
        stream = self.corpus.train_stream
        return [stream[start:stop] for start, stop in _united(first, last)]

    def text(self, scored: TokenText, start: int, stop: int) -> Document:
        """A slice of the document."""
        assert scored.text is not None
        begin, end = scored.begin(np.array([start, stop])).tolist()
        return scored.text[begin:end]

    def too_short(self, seq_len: int, split: str | None) -> str | None:
        """By the bytes, or the tokens."""
        name = self.corpus.name
        if self.tokenizer is None:
            return too_short(self.corpus, seq_len, scored=split, unit="bytes", have=len(self.train))
        if len(self.train) <= seq_len:
            return f"data={name} has {len(self.train):,} tokens to train on; seq_len={seq_len:,} needs more"
        return None

    def prepare(self) -> int:
        """Encode the training documents."""
        if self.tokenizer is None:
            return len(self.train)
        stream = self.corpus.train_stream
        what = f"data={self.corpus.name}: encoding by {self.tokenizer.name}"
        with SlowWork(what, "bytes", len(stream)) as work:
            return len(tokens.encoded(self.tokenizer, stream, work.advance))


class Joined:
    """Documents of token ids as one stream, which copies only the parts that are read."""

    def __init__(self, documents: Slices, separator: int | None) -> None:
        """`separator`: an id that follows each document, if any."""
        self.documents, self.separator = documents, separator
        self.ends = np.cumsum(documents.lengths + (separator is not None))
        """(D,) the end of each document, with its separator."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice, /) -> Ids:
        start, stop, _ = part.indices(len(self))
        parts: list[Ids] = []
        index = int(np.searchsorted(self.ends, start, side="right"))
        begin = int(self.ends[index - 1]) if index else 0
        while begin < stop:
            document: Ids = self.documents[index]
            parts.append(document[max(0, start - begin) : stop - begin].astype(np.int64))
            begin, index = int(self.ends[index]), index + 1
            if self.separator is not None and start < begin <= stop:
                parts.append(np.array([self.separator]))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


class IdReading(Reading):
    """Documents of token ids. The part to score is counted in ids.

    No document contains the separator, so it is never scored; between training documents it is an input and a
    target. In the bytes that baselines learn from it is a newline.
    """

    def __init__(
        self, corpus: Corpus, ids: TokenIds, tokenizer: TextTokenizer | None, vocab_size: int | None
    ) -> None:
        self.corpus, self.tokenizer, self.separator = corpus, tokenizer, ids.separator
        self.knows_bytes = tokenizer is not None
        size = vocab_size if vocab_size is not None else tokenizer.size if tokenizer else None
        if size is None:
            raise CorpusError(
                f"data.vocab_size is missing: data={corpus.name} needs the number of ids, or data.tokenizer; "
                f"the largest id is {ids.most:,}"
            )
        if tokenizer and ids.most >= tokenizer.size:
            raise CorpusError(
                f"data={corpus.name}: holds the id {ids.most:,}; {tokenizer.name} has "
                f"{tokenizer.size:,} entries"
            )
        for what, value in (("holds the id", ids.most), ("data.separator is", ids.separator)):
            if value is not None and value >= size:
                where = "data.vocab_size" if vocab_size is not None else "the size of data.tokenizer"
                raise CorpusError(
                    f"data={corpus.name}: {what} {value:,}; allowed are ids below {where}={size:,}"
                )
        self.size = size
        self.sha256 = corpus.sha256 if tokenizer is None else tokenizer.identity(corpus)

    def _slices(self, split: str) -> Slices:
        documents = self.corpus.split(split)
        assert isinstance(documents, Slices)
        return documents

    @cached_property
    def train(self) -> Joined:  # type: ignore[override]
        """The training documents, with the separator after each if there is one."""
        return Joined(self._slices("train"), self.separator)

    def documents(self, split: str) -> Sequence[Ids]:
        """The documents themselves."""
        return self._slices(split)

    def scored(self, split: str, seq_len: int, at_most: int) -> list[TokenText]:
        """`at_most` counts ids. Documents of which nothing is scored are left out."""
        documents = self._slices(split)
        counts = scored_counts((documents.lengths - 1).tolist(), seq_len, at_most)
        return [self._known(documents[k][: count + 1]) for k, count in enumerate(counts) if count]

    def _known(self, ids: Ids) -> TokenText:
        if self.tokenizer is None:
            return TokenText(ids)
        return TokenText(ids, np.cumsum(self.tokenizer.lengths(ids)))

    def unigram_nats(self) -> Floats:
        """Counted in pieces."""
        counts, stream = np.zeros(self.size, dtype=np.int64), self.train
        for start in range(0, len(stream), CHUNK):
            counts += np.bincount(stream[start : start + CHUNK], minlength=self.size)
        return _nats(counts)

    def words_per_byte(self) -> None:
        """The words of ids are not known."""
        return

    def train_text(self, starts: Ints, length: int) -> list[Document]:
        """The bytes of the ids."""
        windows = np.unique(starts)
        united = _united(windows, windows + length)
        return [self._bytes(self.train[start:stop]) for start, stop in united]

    def text(self, scored: TokenText, start: int, stop: int) -> Document:
        """The bytes of the ids."""
        return self._bytes(scored.ids[start:stop])

    def _bytes(self, ids: Ids) -> Document:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids, newline=self.separator)

    def too_short(self, seq_len: int, split: str | None) -> str | None:
        """By the ids."""
        return too_short(self.corpus, seq_len, scored=split, unit="token ids", have=len(self.train))

    def prepare(self) -> int:
        """There is nothing left: the ids were indexed when the corpus was loaded."""
        return len(self.train)


def _nats(counts: Ints) -> Floats:
    smoothed = counts + 1.0
    return np.asarray(-np.log(smoothed / smoothed.sum()), dtype=np.float64)


def _united(first: Ints, last: Ints) -> list[tuple[int, int]]:
    """Return the union of the intervals [first, last), sorted; first and last are ascending."""
    begins = np.flatnonzero(np.append(True, first[1:] >= last[:-1]))
    ends = np.append(begins[1:], len(first)) - 1
    return list(zip(first[begins].tolist(), last[ends].tolist(), strict=True))


def _first_apart(text: Document, tokenizer: TextTokenizer | None) -> TokenText:
    """Return the tokens of a passage, the first of which is its first byte."""
    if tokenizer is None:
        return TokenText(text, text=text)
    first, rest = tokenizer.encode(text[:1]), tokenizer.encode(text[1:])
    assert first.ends is not None
    assert rest.ends is not None
    return TokenText(np.append(first.ids, rest.ids), np.append(first.ends, 1 + rest.ends), text)


def too_short(corpus: Corpus, seq_len: int, *, scored: str | None, unit: str, have: int) -> str | None:
    """Return why a corpus is too short for windows of this length, or None; `scored` is the split to score,
    if any, and `have` the number of symbols to train on."""
    if have <= seq_len:
        return f"data={corpus.name} has {have:,} {unit} to train on; seq_len={seq_len:,} needs more"
    if scored and (longest := _longest(corpus.split(scored))) <= seq_len:
        return (
            f"data={corpus.name} has no {scored} document over {longest:,} {unit}; "
            f"seq_len={seq_len:,} needs one"
        )
    return None


def _longest(documents: Sequence[Document]) -> int:
    return int(documents.lengths.max()) if isinstance(documents, Slices) else max(map(len, documents))
