"""Ids: language modelling on token ids that the user has already computed.

Shapes: N token ids of a document, V entries of the vocabulary without the mask.

The loss is per token. Bits per byte need the bytes of each token, which are known if `data.tokenizer` is
given: then they are exact, and n-gram tables and compressors are compared on these bytes. Without it there
are neither.

    documents of the data     12 7 31 | 5 5 9 2 | 8 40          | is data.separator
    training                  12 7 31 | 5 5 9 2 | 8 40 |
    scored, each on its own   12 7 31     5 5 9 2    8 40       but for the first of each

No document contains the separator, so it is never scored; in training it is an input and a target. Special
tokens of a tokenizer stand for no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from bench.corpora import Corpus, CorpusError, Document, token_ids
from bench.corpora.base import Ids, Slices
from bench.corpora.token_ids import Joined
from bench.corpora.tokens import TokenText
from bench.tasks.base import Setting, TaskConfig
from bench.tasks.text import Text
from bench.tasks.text_config import TextConfig
from bench.tasks.windows import scored_counts
from variants.knobs import knob

CHUNK = 2**22
"""Token ids that are counted at the same time."""


@dataclass(frozen=True, kw_only=True)
class IdsConfig(TextConfig):
    """The knobs of token ids: data.path is a file, folder or glob of .bin, .npy, or tables with lists of ids.
    data.field is input_ids by default, and data.tokenizer is the tokenizer of the ids."""

    vocab_size: int | None = knob(None, least=1, most=1_048_576, unit="ids")
    """Size of the vocabulary; null is that of data.tokenizer."""
    dtype: Literal["uint16", "uint32"] | None = knob(None)
    """Number format of a .bin file; null reads it from the header of llm.c."""
    separator: int | None = knob(None, least=0)
    """Id that stands between documents, such as 50256 of GPT-2; null if there is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bpe", "max_bytes", "max_undecodable"):
            self.require(name, getattr(self, name) is None, "null: data=ids has token ids already")

    @property
    def size(self) -> int | None:
        """V; None if it is not given."""
        if self.vocab_size is not None:
            return self.vocab_size
        return super().vocabulary - 1 if self.tokenizer is not None else None

    @property
    def vocabulary(self) -> int:
        """The ids and the mask. Raises CorpusError if their number is not given."""
        if self.size is None:
            raise CorpusError(
                "data.vocab_size is missing: data=ids needs the number of different ids, or data.tokenizer"
            )
        return self.size + 1


class IdsOfUser(Text):
    """Predict the next id, or the masked ids, of the user's documents. `test_tokens` counts ids."""

    Config = IdsConfig

    def __init__(self, config: IdsConfig, setting: Setting) -> None:
        """Maps the ids into memory. Raises corpora.CorpusError if they cannot be read."""
        super().__init__(config, setting)
        self.separator = config.separator

    @classmethod
    def load_corpus(cls, config: TextConfig, data: str) -> Corpus:
        """Load the ids. Raises corpora.CorpusError, also for one that is not in the vocabulary."""
        assert isinstance(config, IdsConfig)
        size = config.vocabulary - 1
        options = token_ids.Options(config.path, config.field, config.split, config.dtype, config.separator)
        corpus = token_ids.load(data, options)
        assert corpus.ids is not None
        for what, value in (("holds the id", corpus.ids.most), ("data.separator is", config.separator)):
            if value is not None and value >= size:
                knob = "data.tokenizer has the size" if config.vocab_size is None else "data.vocab_size is"
                raise CorpusError(
                    f"data.path={config.path}: {what} {value:,}; allowed are ids below {size:,}, because "
                    f"{knob} {size:,}"
                )
        return corpus

    @classmethod
    def prepare(cls, config: TaskConfig, data: str) -> int:
        """There is nothing left to do: loading has indexed the ids."""
        assert isinstance(config, IdsConfig)
        return len(_stream(cls.load_corpus(config, data), config.separator))

    def unsupported(self) -> str | None:
        """The documents must be long enough."""
        seq_len, split = self.setting.seq_len, self.setting.test_split
        if (have := len(self.train_tokens)) <= seq_len:
            return f"data={self.corpus.name} has {have:,} ids to train on; seq_len={seq_len:,} needs more"
        if self.setting.test_tokens and (longest := self.corpus.longest(split)) <= seq_len:
            return (
                f"data={self.corpus.name} has no {split} document over {longest:,} ids; seq_len={seq_len:,} "
                "needs one"
            )
        return None

    @cached_property
    def train_tokens(self) -> TokenText:
        """The training documents, with the separator after each if there is one."""
        # it has what is used of an array: its length and its slices
        return TokenText(cast("Ids", _stream(self.corpus, self.separator)))

    @property
    def documents(self) -> Slices:
        """The documents that are scored, as ids."""
        return _slices(self.corpus, self.setting.test_split)

    @property
    def token_documents(self) -> Slices:
        """The same."""
        return self.documents

    @cached_property
    def scored_tokens(self) -> list[TokenText]:
        """The scored part of each document, without documents of which nothing is scored."""
        documents, setting = self.documents, self.setting
        counts = scored_counts((documents.lengths - 1).tolist(), setting.seq_len, setting.test_tokens)
        return [self._known(documents[k][: count + 1]) for k, count in enumerate(counts) if count]

    def _known(self, ids: Ids) -> TokenText:
        if self.tokenizer is None:
            return TokenText(ids)
        return TokenText(ids, np.cumsum(self.tokenizer.bytes_of_ids.count(ids)))

    def bytes_per_target(self) -> float | None:
        """The bytes of all targets divided by their number; None without a tokenizer, or if all are special
        tokens."""
        if self.tokenizer is None:
            return None
        targets = sum(len(text) - 1 for text in self.scored_tokens)
        first = np.array([1])
        return sum(text.bytes - int(text.begin(first)[0]) for text in self.scored_tokens) / targets or None

    def words_per_byte(self) -> None:
        """The words of ids are not known."""
        return

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """Counted in pieces."""
        size, stream = self.vocabulary - 1, self.train_tokens.ids
        counts = np.ones(size)
        for start in range(0, len(stream), CHUNK):
            counts += np.bincount(stream[start : start + CHUNK], minlength=size)
        return np.asarray(-np.log(counts / counts.sum()), dtype=np.float64)

    def train_bytes(self, start: int, stop: int) -> Document:
        """The bytes of ids [start, stop) of the training documents, with a newline for the separator."""
        assert self.tokenizer is not None
        return self.tokenizer.bytes_of_ids.decode(self.train_tokens.ids[start:stop], self.separator)

    def scored_bytes(self, document: int, start: int, stop: int) -> Document:
        """As for text."""
        return self._scored_content[document][start:stop]

    @cached_property
    def _scored_content(self) -> list[Document]:
        assert self.tokenizer is not None
        return [self.tokenizer.bytes_of_ids.decode(text.ids) for text in self.scored_tokens]


def _slices(corpus: Corpus, split: str) -> Slices:
    documents: Any = corpus.split(split)
    assert isinstance(documents, Slices)
    return documents


def _stream(corpus: Corpus, separator: int | None) -> Joined:
    return Joined(_slices(corpus, "train"), separator)
