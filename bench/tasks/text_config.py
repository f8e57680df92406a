"""The knobs of text, and the tokenizer that they choose."""

from __future__ import annotations

from dataclasses import dataclass

from bench.corpora import Corpus, CorpusOptions, tokens
from bench.corpora.tokens import TextTokenizer
from bench.tasks.base import TaskConfig
from variants.knobs import knob

MASK = 256
"""The mask of bytes; its number is that of the bytes."""


@dataclass(frozen=True, kw_only=True)
class TextConfig(TaskConfig):
    """The knobs of a corpus."""

    path: str | None = None
    """A file, folder or glob, for data=files. For other corpora: the location of their files, if not the
    cache."""
    max_bytes: int | None = knob(None, least=1, unit="bytes")
    """Maximum number of bytes of training documents, for corpora that are too large to use as a whole."""
    bpe: int | None = knob(None, least=257, most=1_048_576, unit="tokens", younger=True)
    """Entries of a byte-pair encoding that is trained on the training split; null reads bytes. The number is
    that of bytes and merges: 2048 and 16384 are usual for small models."""
    tokenizer: str | None = knob(None, younger=True)
    """A byte-level tokenizer in a file of the library tokenizers, instead of one that is trained."""
    max_undecodable: float | None = knob(None, least=0, most=1, younger=True, decides=False)
    """Maximum share of bytes that are not UTF-8 in a file of data=files; null is 0.3. 1 reads text in any
    encoding."""
    field: str | None = knob(None, younger=True)
    """Column of the documents in the tables of data=rows; null is text."""
    split: str | None = knob(None, younger=True)
    """Split of the data of data=rows that is read; null reads all. What is missing of validation and test is
    held out of it by the hash of each document."""

    def __post_init__(self) -> None:
        only_one = "null beside data.tokenizer, which is a tokenizer already"
        self.require("bpe", self.bpe is None or self.tokenizer is None, only_one)

    @property
    def vocabulary(self) -> int:
        """The bytes, or the entries of the tokenizer, and the mask."""
        if self.tokenizer is not None:
            return tokens.from_file(self.tokenizer).size + 1
        return (self.bpe or MASK) + 1

    def options(self) -> CorpusOptions:
        """Return the knobs that corpora read."""
        return CorpusOptions(
            path=self.path,
            max_bytes=self.max_bytes,
            max_undecodable=self.max_undecodable,
            field=self.field,
            split=self.split,
        )


def tokenizer_of(config: TextConfig, corpus: Corpus) -> TextTokenizer | None:
    """Return the tokenizer of the knobs; None reads bytes. Raises corpora.CorpusError."""
    if config.tokenizer is not None:
        return tokens.from_file(config.tokenizer)
    return None if config.bpe is None else tokens.trained(corpus, config.bpe)
