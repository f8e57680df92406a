"""Documents of token ids that a user has computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bench.corpora import Corpus, CorpusError, Document
from bench.corpora.base import Ids, Slices, TokenIds
from bench.corpora.tokens import TextTokenizer, TokenText
from bench.tasks.readings import Floats, Ints, Reading, smoothed_nats, too_short, united
from bench.tasks.windows import scored_counts

CHUNK = 2**22
"""Token ids that are counted at the same time."""


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
        return TokenText(ids, np.cumsum(self.tokenizer.bytes_of_ids.count(ids)))

    def unigram_nats(self) -> Floats:
        """Counted in pieces."""
        counts, stream = np.zeros(self.size, dtype=np.int64), self.train
        for start in range(0, len(stream), CHUNK):
            counts += np.bincount(stream[start : start + CHUNK], minlength=self.size)
        return smoothed_nats(counts)

    def words_per_byte(self) -> None:
        """The words of ids are not known."""
        return

    def train_text(self, starts: Ints, length: int) -> list[Document]:
        """The bytes of the ids."""
        windows = np.unique(starts)
        parts = united(windows, windows + length)
        return [self._bytes(self.train[start:stop]) for start, stop in parts]

    def text(self, scored: TokenText, start: int, stop: int) -> Document:
        """The bytes of the ids."""
        return self._bytes(scored.ids[start:stop])

    def _bytes(self, ids: Ids) -> Document:
        assert self.tokenizer is not None
        return self.tokenizer.bytes_of_ids.decode(ids, newline=self.separator)

    def too_short(self, seq_len: int, split: str | None) -> str | None:
        """By the ids."""
        return too_short(self.corpus, seq_len, scored=split, unit="token ids", have=len(self.train))

    def prepare(self) -> int:
        """There is nothing left: the ids were indexed when the corpus was loaded."""
        return len(self.train)
