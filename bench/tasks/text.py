"""Text: language modelling, causal or masked, on the documents of a corpus, as bytes or as tokens.

Shapes: B batch, T tokens. Tokens are bytes 0–255, the entries of a tokenizer, or ids of a user
(`bench.tasks.readings`). One additional symbol, the last of the vocabulary, is the mask (MASK for bytes),
used only by masked models.

    clm   inputs   T h e _ q u i c k      targets  h e _ q u i c k _
    mlm   inputs   T h # _ q u # c k      targets  . . e . . . i . .     (. is not scored)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bench import corpora
from bench.corpora import CorpusError, CorpusOptions, Document, tokens
from bench.corpora.base import Ids
from bench.corpora.tokens import TokenText
from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig
from bench.tasks.id_reading import IdReading
from bench.tasks.readings import Reading, Stream
from bench.tasks.text_reading import BYTES, TextReading
from bench.tasks.windows import Passage, document_batches, sliding_windows, window_batches
from variants.knobs import knob

MASK = 256
VOCABULARY = 257
MASKED_SHARE = 0.15
"""Share of the tokens that a masked model must predict (Devlin 2018, arXiv:1810.04805). Each of them is
replaced by MASK. The paper's 80/10/10 mixture helps fine-tuning, which is not done here."""

Ints = npt.NDArray[np.int64]


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
    """A byte-level tokenizer in a file of the library tokenizers, instead of one that is trained. For
    data=ids it is that of the ids, by which the bytes of each are known."""
    max_undecodable: float | None = knob(None, least=0, most=1, younger=True, decides=False)
    """Maximum share of bytes that are not UTF-8 in a file of data=files; null is 0.3. 1 reads text in any
    encoding."""
    field: str | None = knob(None, younger=True)
    """Column of data=rows or of tables of data=ids; null is text or input_ids."""
    split: str | None = knob(None, younger=True)
    """Split of data=rows or data=ids that is read; null reads all. What is missing of validation and test is
    held out of it by the hash of each document."""
    dtype: Literal["uint16", "uint32"] | None = knob(None, younger=True)
    """Number format of a .bin file of data=ids; null reads it from the header of llm.c."""
    vocab_size: int | None = knob(None, least=1, most=1_048_576, unit="ids", younger=True)
    """Size of the vocabulary of data=ids; null is that of data.tokenizer."""
    separator: int | None = knob(None, least=0, younger=True)
    """Id that stands between the documents of data=ids, such as 50256 of GPT-2; null if there is none."""

    def __post_init__(self) -> None:
        only_one = "null beside data.tokenizer, which is a tokenizer already"
        self.require("bpe", self.bpe is None or self.tokenizer is None, only_one)

    @property
    def vocabulary(self) -> int:
        """The bytes, the ids or the entries of the tokenizer, and the mask."""
        if self.vocab_size is not None:
            return self.vocab_size + 1
        if self.tokenizer is not None:
            return tokens.from_file(self.tokenizer).size + 1
        return (self.bpe or MASK) + 1

    def options(self) -> CorpusOptions:
        """Return the knobs that a corpus may read."""
        return CorpusOptions(
            path=self.path,
            max_bytes=self.max_bytes,
            max_undecodable=self.max_undecodable,
            field=self.field,
            split=self.split,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            separator=self.separator,
        )


class Text(Task):
    """Predict the next token, or the masked tokens, of the corpus that `data` names.

    The scored bytes of a document do not depend on its tokens: `test_tokens` counts bytes, and the first
    byte, which no causal model predicts, is a token of its own. For token ids it counts ids.
    """

    Config = TextConfig
    objectives = ("clm", "mlm")

    def __init__(self, config: TextConfig, setting: Setting) -> None:
        """Loads the corpus. Raises corpora.CorpusError if it is not available."""
        super().__init__(config, setting)
        self.reading = _reading(config, setting.data)

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """Return the hash of the corpus, which depends only on its documents, and of the tokenizer if there
        is one. Raises corpora.CorpusError."""
        return _reading(config, data).sha256

    @classmethod
    def prepare(cls, config: TaskConfig, data: str) -> int:
        """Encode the training documents."""
        return _reading(config, data).prepare()

    @classmethod
    def data_figures(cls, config: TaskConfig, data: str) -> dict[str, Any]:
        """Return how much data there is."""
        return _reading(config, data).figures()

    @classmethod
    def describe(cls, config: TaskConfig, data: str) -> str:
        """Return what was read, in a line."""
        path = _text_config(config).path
        where = f"data={data}" + (f" data.path={path}" if path else "")
        return f"{where}: {_reading(config, data).describe()}"

    def unsupported(self) -> str | None:
        """The corpus must be long enough."""
        seq_len, split = self.setting.seq_len, self.setting.test_split
        if reason := self.reading.too_short(seq_len, split if self.setting.test_tokens else None):
            return reason
        if self.setting.test_tokens and max(len(p.targets) for p in self.passages) < seq_len:
            longest = f"{max(len(p.targets) for p in self.passages):,}"
            return (
                f"data={self.setting.data}: no scored part of a {split} document has over {longest} tokens; "
                f"seq_len={seq_len:,} needs one: raise measure.eval_tokens, which counts bytes"
            )
        return None

    def train_batch(self, step: int, done: float) -> Batch:
        """Windows of the training documents. There is no curriculum, so `done` has no effect."""
        return train_batch(
            self.reading.train,
            seq_len=self.setting.seq_len,
            batch_size=self.setting.batch_size,
            objective=self.objective,
            replicate=self.setting.replicate,
            step=step,
            mask=self.vocabulary - 1,
        )

    @property
    def token_documents(self) -> Sequence[Ids]:
        """The tokens of the documents that are scored."""
        return self.reading.documents(self.setting.test_split)

    @cached_property
    def scored_tokens(self) -> list[TokenText]:
        """The tokens of the scored part of each document; the last is never an input."""
        setting = self.setting
        return self.reading.scored(setting.test_split, setting.seq_len, setting.test_tokens)

    @cached_property
    def passages(self) -> list[Passage]:
        """The scored part of each document."""
        texts = [text.ids for text in self.scored_tokens]
        return passages_of(texts, objective=self.objective, mask=self.vocabulary - 1)

    def bytes_per_target(self) -> float | None:
        """Mean number of bytes of a scored target of a causal model, exact; None if the bytes of the tokens
        are not known."""
        if not self.reading.knows_bytes:
            return None
        targets = sum(len(text) - 1 for text in self.scored_tokens)
        return sum(text.bytes - text.first for text in self.scored_tokens) / targets

    def words_per_byte(self) -> float | None:
        """Words per byte of the test documents; None if the words are not known."""
        return self.reading.words_per_byte()

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """−ln p of each token under the frequencies of the training tokens, add-one smoothed."""
        return self.reading.unigram_nats()

    def test_batches(self, stride: int | None = None) -> Iterator[Batch]:
        """Yield windows of the test documents at distances of `stride` tokens; None means without overlap."""
        seq_len = self.setting.seq_len
        return window_batches(self.passages, seq_len, stride or seq_len, self.setting.batch_size)

    def test_documents(self) -> Iterator[Batch]:
        """Yield the same targets in rows that are whole documents."""
        return document_batches(self.passages, self.setting.batch_size)

    def train_text(self, steps: int) -> list[Document]:
        """Return the bytes of the first `steps` training batches, inputs and targets, as parts of the
        training documents. Bytes of several windows are returned once, in one part."""
        seq_len, length = self.setting.seq_len, len(self.reading.train)
        starts = [
            _draw_starts(self.train_generator(step), length, seq_len, self.setting.batch_size)
            for step in range(steps)
        ]
        return self.reading.train_text(np.concatenate(starts), seq_len + 1)

    def scored_text(self, stride: int) -> list[tuple[Document, int]]:
        """Return the windows of `test_batches` as bytes: inputs and last target, and the place of the first
        byte that is scored. Only for clm, and if the bytes of the tokens are known."""
        found = []
        windows = sliding_windows([len(p.targets) for p in self.passages], self.setting.seq_len, stride)
        for k, start, stop, scored in windows:
            text = self.scored_tokens[k]
            begin, first = text.begin(np.array([start, scored + 1])).tolist()
            found.append((self.reading.text(text, start, stop + 1), first - begin))
        return found


def _text_config(config: TaskConfig) -> TextConfig:
    assert isinstance(config, TextConfig)
    return config


def _reading(config: TaskConfig, data: str) -> Reading:
    """Return the corpus as the tokens of the knobs. Raises corpora.CorpusError."""
    knobs = _text_config(config)
    corpus = corpora.load(data, knobs.options())
    tokenizer = None if knobs.tokenizer is None else tokens.from_file(knobs.tokenizer)
    if corpus.ids is not None:
        if knobs.bpe is not None:
            raise CorpusError(f"data.bpe={knobs.bpe}: data={data} has token ids already; leave it out")
        return IdReading(corpus, corpus.ids, tokenizer, knobs.vocab_size)
    if knobs.bpe is not None:
        return TextReading(corpus, tokens.trained(corpus, knobs.bpe), size=knobs.bpe)
    return TextReading(corpus, tokenizer, size=tokenizer.size if tokenizer else BYTES)


def _batch(windows: list[Ids], objective: str, generator: np.random.Generator, mask: int) -> Batch:
    """Windows of T + 1 tokens → a batch. Both objectives use the same first T tokens."""
    rows: Ints = np.stack(windows).astype(np.int64)
    inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
    if objective == "mlm":
        masked = generator.random(inputs.shape) < MASKED_SHARE
        masked[:, -1] |= ~masked.any(axis=1)  # a short window must have a target
        targets = np.where(masked, inputs, IGNORED)
        inputs = np.where(masked, mask, inputs)
    return Batch.of(inputs, targets)


def train_batch(
    stream: Stream,
    *,
    seq_len: int,
    batch_size: int,
    objective: str,
    replicate: int,
    step: int,
    mask: int = MASK,
) -> Batch:
    """Return the batch of one training step: a pure function of its arguments.

    Windows start anywhere in `stream`, the tokens of the concatenated training documents. Two variants with
    the same arguments see the same text, and a resumed run sees the same text as an uninterrupted one.
    """
    generator = np.random.default_rng([replicate, step])
    starts = _draw_starts(generator, len(stream), seq_len, batch_size)
    return _batch([stream[s : s + seq_len + 1] for s in starts], objective, generator, mask)


def _draw_starts(generator: np.random.Generator, length: int, seq_len: int, batch_size: int) -> Ints:
    """(B,) the first token of each window of a training batch in a stream; the generator is new."""
    return generator.integers(0, length - seq_len, size=batch_size)


def passages_of(texts: Sequence[Ids], *, objective: str, mask: int = MASK) -> list[Passage]:
    """Return the inputs and targets of the scored parts of documents. The last token is never an input.

    Both objectives read the same tokens, and whether a token is masked does not depend on its window.
    """
    found = []
    for index, text in enumerate(texts):
        ids: Ints = text.astype(np.int64)
        inputs, targets = ids[:-1], ids[1:]
        if objective == "mlm" and len(inputs):
            masked = np.random.default_rng([0, index]).random(len(inputs)) < MASKED_SHARE
            masked[-1] |= not masked.any()  # a short document must have a target
            inputs, targets = np.where(masked, mask, inputs), np.where(masked, inputs, IGNORED)
        found.append(Passage(inputs, targets))
    return found
