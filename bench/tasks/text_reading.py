"""Documents of text, as bytes or as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from bench.corpora import Corpus, Document, tokens
from bench.corpora.base import Ids
from bench.corpora.tokens import TextTokenizer, TokenText
from bench.inputs.slow_work import SlowWork
from bench.tasks.readings import Floats, Ints, Reading, smoothed_nats, too_short, united
from bench.tasks.windows import scored_counts

BYTES = 256


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
        return smoothed_nats(np.bincount(self.train, minlength=self.size))

    def words_per_byte(self) -> float:
        """That of the corpus."""
        return self.corpus.words_per_byte()

    def train_text(self, starts: Ints, length: int) -> list[Document]:
        """Slices of the training documents."""
        text, windows = self._train_tokens, np.unique(starts)
        first, last = text.begin(windows), text.begin(windows + length)
        stream = self.corpus.train_stream
        return [stream[start:stop] for start, stop in united(first, last)]

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


def _first_apart(text: Document, tokenizer: TextTokenizer | None) -> TokenText:
    """Return the tokens of a passage, the first of which is its first byte."""
    if tokenizer is None:
        return TokenText(text, text=text)
    first, rest = tokenizer.encode(text[:1]), tokenizer.encode(text[1:])
    assert first.ends is not None
    assert rest.ends is not None
    return TokenText(np.append(first.ids, rest.ids), np.append(first.ends, 1 + rest.ends), text)
