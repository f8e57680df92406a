"""Text: language modelling, causal or masked, on the documents of a corpus, as bytes or as tokens.

Shapes: B batch, T tokens. Tokens are bytes 0–255, or the entries of a tokenizer (`bench.corpora.tokens`). One
additional symbol, the last of the vocabulary, is the mask (MASK for bytes), used only by masked models.

    clm   inputs   T h e _ q u i c k      targets  h e _ q u i c k _
    mlm   inputs   T h # _ q u # c k      targets  . . e . . . i . .     (. is not scored)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from bench import corpora
from bench.corpora import Corpus, Document, tokens
from bench.corpora.base import SPLITS, Ids, in_words
from bench.corpora.tokens import TextTokenizer, TokenText
from bench.inputs.slow_work import SlowWork
from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig
from bench.tasks.text_config import MASK, TextConfig, tokenizer_of
from bench.tasks.windows import Passage, document_batches, scored_counts, sliding_windows, window_batches

VOCABULARY = 257
MASKED_SHARE = 0.15
"""Share of the tokens that a masked model must predict (Devlin 2018, arXiv:1810.04805). Each of them is
replaced by MASK. The paper's 80/10/10 mixture helps fine-tuning, which is not done here."""

Ints = npt.NDArray[np.int64]


class Text(Task):
    """Predict the next token, or the masked tokens, of the corpus that `data` names.

    The scored bytes of a document do not depend on its tokens: `test_tokens` counts bytes, and the first
    byte, which no causal model predicts, is a token of its own.
    """

    Config = TextConfig
    objectives: ClassVar[tuple[str, ...]] = ("clm", "mlm")

    def __init__(self, config: TextConfig, setting: Setting) -> None:
        """Loads the corpus. Raises corpora.CorpusError if it is not available."""
        super().__init__(config, setting)
        self.corpus = self.load_corpus(config, setting.data)
        self.tokenizer = tokenizer_of(config, self.corpus)

    @classmethod
    def load_corpus(cls, config: TextConfig, data: str) -> Corpus:
        """Load the corpus that `data` names. Raises corpora.CorpusError."""
        return corpora.load(data, config.options())

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """Return the hash of the corpus, which depends only on its documents, and of the tokenizer if there
        is one. Raises corpora.CorpusError."""
        assert isinstance(config, TextConfig)
        corpus = cls.load_corpus(config, data)
        tokenizer = tokenizer_of(config, corpus)
        return corpus.sha256 if tokenizer is None else tokenizer.identity(corpus)

    @classmethod
    def prepare(cls, config: TaskConfig, data: str) -> int:
        """Encode the training documents."""
        assert isinstance(config, TextConfig)
        corpus = cls.load_corpus(config, data)
        tokenizer = tokenizer_of(config, corpus)
        if tokenizer is None:
            return corpus.symbols("train") + len(corpus.train)  # a newline after each
        stream = corpus.train_stream
        with SlowWork(f"data={data}: encoding by {tokenizer.name}", "bytes", len(stream)) as work:
            return len(tokens.encoded(tokenizer, stream, work.advance))

    @classmethod
    def data_figures(cls, config: TaskConfig, data: str) -> dict[str, Any]:
        """Return how much was read."""
        assert isinstance(config, TextConfig)
        corpus = cls.load_corpus(config, data)
        return {
            "data_documents": sum(len(corpus.split(split)) for split in SPLITS),
            "data_bytes": sum(map(corpus.symbols, SPLITS)) if corpus.ids is None else None,
            "data_skipped": in_words(corpus.skipped) or None,
        }

    @classmethod
    def describe(cls, config: TaskConfig, data: str) -> str:
        """Return what was read, in a line."""
        assert isinstance(config, TextConfig)
        corpus = cls.load_corpus(config, data)
        return corpus.describe(f"data={data}" + (f" data.path={config.path}" if config.path else ""))

    def unsupported(self) -> str | None:
        """The corpus must be long enough."""
        seq_len, split = self.setting.seq_len, self.setting.test_split
        if self.tokenizer is None:
            return too_short(self.corpus, seq_len, scored=split if self.setting.test_tokens else None)
        if len(self.train_tokens) <= seq_len:
            have = f"{len(self.train_tokens):,} tokens to train on"
            return f"data={self.corpus.name} has {have}; seq_len={seq_len:,} needs more"
        if self.setting.test_tokens and max(len(p.targets) for p in self.passages) < seq_len:
            longest = f"{max(len(p.targets) for p in self.passages):,}"
            return (
                f"data={self.corpus.name}: no scored part of a {split} document has over {longest} tokens; "
                f"seq_len={seq_len:,} needs one: raise measure.eval_tokens, which counts bytes"
            )
        return None

    @cached_property
    def train_tokens(self) -> TokenText:
        """The training documents as tokens."""
        return self.tokens_of(self.corpus.train_stream)

    def tokens_of(self, text: Document) -> TokenText:
        """Return the tokens of a text; those of a tokenizer are cached on the disk."""
        return TokenText(text) if self.tokenizer is None else tokens.encoded(self.tokenizer, text)

    def train_batch(self, step: int, done: float) -> Batch:
        """Windows of the training documents. There is no curriculum, so `done` has no effect."""
        return train_batch(
            self.train_tokens.ids,
            seq_len=self.setting.seq_len,
            batch_size=self.setting.batch_size,
            objective=self.objective,
            replicate=self.setting.replicate,
            step=step,
            mask=self.vocabulary - 1,
        )

    @property
    def documents(self) -> Sequence[Document]:
        """The documents that are scored."""
        return self.corpus.split(self.setting.test_split)

    @property
    def token_documents(self) -> Sequence[Ids]:
        """The tokens of the documents that are scored."""
        return [self.tokens_of(document).ids for document in self.documents]

    @cached_property
    def scored_tokens(self) -> list[TokenText]:
        """The tokens of the scored part of each document; the last is never an input."""
        lengths = [len(document) - 1 for document in self.documents]
        counts = scored_counts(lengths, self.setting.seq_len, self.setting.test_tokens)
        pairs = zip(self.documents, counts, strict=True)
        return [_first_apart(document[: count + 1], self.tokenizer) for document, count in pairs]

    @cached_property
    def passages(self) -> list[Passage]:
        """The scored part of each document."""
        texts = [text.ids for text in self.scored_tokens]
        return passages_of(texts, objective=self.objective, mask=self.vocabulary - 1)

    def bytes_per_target(self) -> float | None:
        """Mean number of bytes of a scored target of a causal model; exact, because tokens are bytes. None if
        the bytes of the tokens are not known."""
        targets = sum(len(text.ids) - 1 for text in self.scored_tokens)
        return sum(text.bytes - 1 for text in self.scored_tokens if text.bytes) / targets

    def words_per_byte(self) -> float | None:
        """Words per byte of scored text, a constant of the corpus; None if the words are not known."""
        return self.corpus.words_per_byte()

    def unigram_nats(self) -> npt.NDArray[np.float64]:
        """−ln p of each token under the frequencies of the training tokens, add-one smoothed."""
        if self.tokenizer is None:
            return self.corpus.unigram_nats()
        counts = np.bincount(self.train_tokens.ids, minlength=self.vocabulary - 1) + 1.0
        return np.asarray(-np.log(counts / counts.sum()), dtype=np.float64)

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
        seq_len, text = self.setting.seq_len, self.train_tokens
        starts = [
            _draw_starts(self.train_generator(step), len(text), seq_len, self.setting.batch_size)
            for step in range(steps)
        ]
        windows = np.unique(np.concatenate(starts))
        first, last = text.begin(windows), text.begin(windows + seq_len + 1)
        begins = np.flatnonzero(np.append(True, first[1:] >= last[:-1]))
        ends = np.append(begins[1:], len(windows)) - 1
        pairs = zip(first[begins].tolist(), last[ends].tolist(), strict=True)
        return [self.train_bytes(start, stop) for start, stop in pairs]

    def train_bytes(self, start: int, stop: int) -> Document:
        """Return the bytes [start, stop) of the training documents."""
        return self.corpus.train_stream[start:stop]

    def scored_text(self, stride: int) -> list[tuple[Document, int]]:
        """Return the windows of `test_batches` as bytes: inputs and last target, and the place of the first
        byte that is scored. Only for clm."""
        found = []
        windows = sliding_windows([len(p.targets) for p in self.passages], self.setting.seq_len, stride)
        for k, start, stop, scored in windows:
            text = self.scored_tokens[k]
            begin, first, end = text.begin(np.array([start, scored + 1, stop + 1])).tolist()
            found.append((self.scored_bytes(k, begin, end), first - begin))
        return found

    def scored_bytes(self, document: int, start: int, stop: int) -> Document:
        """Return the bytes [start, stop) of the scored part of a document."""
        return self.documents[document][start:stop]


def _first_apart(text: Document, tokenizer: TextTokenizer | None) -> TokenText:
    """Return the tokens of a passage, the first of which is its first byte."""
    if tokenizer is None:
        return TokenText(text)
    first, rest = tokenizer.encode(text[:1]), tokenizer.encode(text[1:])
    assert first.ends is not None
    assert rest.ends is not None
    return TokenText(np.append(first.ids, rest.ids), np.append(first.ends, 1 + rest.ends))


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
    stream: Ids,
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


def too_short(corpus: Corpus, seq_len: int, *, scored: str | None) -> str | None:
    """Return why the corpus is too short for windows of this length, or None;
    `scored` is the split to score, if any."""
    if len(corpus.train_stream) <= seq_len:
        have = len(corpus.train_stream)
        return f"data={corpus.name} has {have:,} bytes to train on; seq_len={seq_len:,} needs more"
    if scored and (longest := corpus.longest(scored)) <= seq_len:
        return (
            f"data={corpus.name} has no {scored} document over {longest:,} bytes; "
            f"seq_len={seq_len:,} needs one"
        )
    return None
