"""Text: byte-level language modelling, causal or masked, on the documents of a corpus.

Shapes: B batch, T tokens. Tokens are bytes 0–255; MASK is one additional symbol, used only by masked models.

    clm   inputs   T h e _ q u i c k      targets  h e _ q u i c k _
    mlm   inputs   T h # _ q u # c k      targets  . . e . . . i . .     (. is not scored)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from bench import corpora
from bench.corpora import Corpus, Document
from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig
from bench.tasks.windows import Passage, document_batches, scored_counts, sliding_windows, window_batches
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

    @property
    def vocabulary(self) -> int:
        """256 bytes and MASK."""
        return VOCABULARY


class Text(Task):
    """Predict the next byte, or the masked bytes, of the corpus that `data` names."""

    Config = TextConfig
    objectives = ("clm", "mlm")

    def __init__(self, config: TextConfig, setting: Setting) -> None:
        """Loads the corpus. Raises corpora.CorpusError if it is not available."""
        super().__init__(config, setting)
        self.corpus = corpora.load(setting.data, config.path, config.max_bytes)

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """Return the hash of the corpus, which depends only on its documents. Raises corpora.CorpusError."""
        assert isinstance(config, TextConfig)
        return corpora.load(data, config.path, config.max_bytes).sha256

    def unsupported(self) -> str | None:
        """The corpus must be long enough."""
        scored = self.setting.test_split if self.setting.test_tokens else None
        return too_short(self.corpus, self.setting.seq_len, scored=scored)

    def train_batch(self, step: int, done: float) -> Batch:
        """Windows of the training documents. There is no curriculum, so `done` has no effect."""
        return train_batch(
            self.corpus,
            seq_len=self.setting.seq_len,
            batch_size=self.setting.batch_size,
            objective=self.objective,
            replicate=self.setting.replicate,
            step=step,
        )

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents that are scored."""
        return self.corpus.split(self.setting.test_split)

    @cached_property
    def passages(self) -> list[Passage]:
        """The scored part of each document."""
        return scored_passages(
            self.documents,
            seq_len=self.setting.seq_len,
            objective=self.objective,
            max_tokens=self.setting.test_tokens,
        )

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
        length = self.setting.seq_len + 1
        starts = [
            _draw_starts(self.train_generator(step), self.corpus, length - 1, self.setting.batch_size)
            for step in range(steps)
        ]
        first = np.unique(np.concatenate(starts))
        begins = np.flatnonzero(np.diff(first, prepend=-length) >= length)
        ends = np.append(begins[1:], len(first)) - 1
        stream = self.corpus.train_stream
        return [stream[first[begin] : first[end] + length] for begin, end in zip(begins, ends, strict=True)]

    def scored_text(self, stride: int) -> list[tuple[Document, int]]:
        """Return the windows of `test_batches` as bytes: inputs and last target, and the place of the first
        byte that is scored. Only for clm."""
        passages = self.passages
        texts = [self.documents[k][: len(passage.targets) + 1] for k, passage in enumerate(passages)]
        windows = sliding_windows([len(p.targets) for p in passages], self.setting.seq_len, stride)
        return [(texts[w.document][w.start : w.stop + 1], w.scored - w.start + 1) for w in windows]


def _batch(windows: list[Document], objective: str, generator: np.random.Generator) -> Batch:
    """Windows of T + 1 bytes → a batch. Both objectives use the same first T bytes."""
    tokens: Ints = np.stack(windows).astype(np.int64)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if objective == "mlm":
        masked = generator.random(inputs.shape) < MASKED_SHARE
        masked[:, -1] |= ~masked.any(axis=1)  # a short window must have a target
        targets = np.where(masked, inputs, IGNORED)
        inputs = np.where(masked, MASK, inputs)
    return Batch.of(inputs, targets)


def train_batch(
    corpus: Corpus, *, seq_len: int, batch_size: int, objective: str, replicate: int, step: int
) -> Batch:
    """Return the batch of one training step: a pure function of its arguments.

    Windows start anywhere in the concatenated training documents. Two variants with the same arguments see
    the same bytes, and a resumed run sees the same bytes as an uninterrupted one.
    """
    generator = np.random.default_rng([replicate, step])
    stream = corpus.train_stream
    starts = _draw_starts(generator, corpus, seq_len, batch_size)
    return _batch([stream[s : s + seq_len + 1] for s in starts], objective, generator)


def _draw_starts(generator: np.random.Generator, corpus: Corpus, seq_len: int, batch_size: int) -> Ints:
    """(B,) the first byte of each window of a training batch; the generator is new."""
    return generator.integers(0, len(corpus.train_stream) - seq_len, size=batch_size)


def scored_passages(
    documents: tuple[Document, ...], *, seq_len: int, objective: str, max_tokens: int
) -> list[Passage]:
    """Return the scored part of each held-out document, from its first byte on: the same for every variant
    and replicate. `scored_counts` determines its length. The last byte is never an input.

    Both objectives read the same bytes, and whether a byte is masked does not depend on its window.
    """
    found = []
    taken = scored_counts([len(document) - 1 for document in documents], seq_len, max_tokens)
    for index, (document, count) in enumerate(zip(documents, taken, strict=True)):
        tokens: Ints = document[: count + 1].astype(np.int64)
        inputs, targets = tokens[:-1], tokens[1:]
        if objective == "mlm" and count:
            masked = np.random.default_rng([0, index]).random(count) < MASKED_SHARE
            masked[-1] |= not masked.any()  # a short document must have a target
            inputs, targets = np.where(masked, MASK, inputs), np.where(masked, inputs, IGNORED)
        found.append(Passage(inputs, targets))
    return found


def too_short(corpus: Corpus, seq_len: int, *, scored: str | None) -> str | None:
    """Return why the corpus is too short for windows of this length, or None;
    `scored` is the split to score, if any."""
    if len(corpus.train_stream) <= seq_len:
        have = len(corpus.train_stream)
        return f"data={corpus.name} has {have:,} bytes to train on; seq_len={seq_len:,} needs more"
    if scored and (longest := max(map(len, corpus.split(scored)))) <= seq_len:
        return (
            f"data={corpus.name} has no {scored} document over {longest:,} bytes; "
            f"seq_len={seq_len:,} needs one"
        )
    return None
