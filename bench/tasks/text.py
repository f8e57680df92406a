"""Text: byte-level language modelling, causal or masked, on the documents of a corpus.

Shapes: B batch, T tokens. Tokens are bytes 0–255; MASK is one more symbol, read by masked models only.

    clm   inputs   T h e _ q u i c k      targets  h e _ q u i c k _
    mlm   inputs   T h # _ q u # c k      targets  . . e . . . i . .     (. is not scored)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from bench import corpora
from bench.corpora import Corpus, Document
from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig
from bench.tasks.windows import Passage, entire, shares, windowed

MASK = 256
VOCABULARY = 257
MASKED_SHARE = 0.15
"""Share of the tokens that a masked model must fill in (Devlin 2018, arXiv:1810.04805). Every one of
them is replaced by MASK; the paper's 80/10/10 mixture is for fine-tuning, which nobody does here."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TextConfig(TaskConfig):
    """Where the corpus is."""

    path: str | None = None
    """A file, folder or glob, for data=files; for others where their files lie, if not in the cache."""
    max_bytes: int | None = None
    """Most bytes of training documents to take, where a corpus is too large for whole."""

    @property
    def vocabulary(self) -> int:
        """256 bytes and MASK."""
        return VOCABULARY


class Text(Task):
    """The next byte, or the masked ones, of a corpus: the one that `data=` names."""

    Config = TextConfig
    objectives = ("clm", "mlm")

    def __init__(self, config: TextConfig, setting: Setting) -> None:
        """Loads the corpus. Raises corpora.CorpusError where it cannot be had."""
        super().__init__(config, setting)
        self.corpus = corpora.load(setting.data, config.path, config.max_bytes)

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """The corpus's own: of its documents, wherever they lie. Raises corpora.CorpusError."""
        assert isinstance(config, TextConfig)
        return corpora.load(data, config.path, config.max_bytes).sha256

    def unsupported(self) -> str | None:
        """A corpus that is too short."""
        scored = self.setting.test_split if self.setting.test_tokens else None
        return too_short(self.corpus, self.setting.seq_len, scored=scored)

    def train_batch(self, step: int, done: float) -> Batch:
        """Windows of the training documents; no harder at the end than at the beginning."""
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
        """Those that are scored."""
        return self.corpus.split(self.setting.test_split)

    @cached_property
    def passages(self) -> list[Passage]:
        """What is scored of each document."""
        return held_out(
            self.documents,
            seq_len=self.setting.seq_len,
            objective=self.objective,
            max_tokens=self.setting.test_tokens,
        )

    def test_batches(self, stride: int | None = None) -> Iterator[Batch]:
        """Windows of the test documents, each `stride` tokens after the one before; None: side by side."""
        seq_len = self.setting.seq_len
        return windowed(self.passages, seq_len, stride or seq_len, self.setting.batch_size)

    def test_documents(self) -> Iterator[Batch]:
        """The same targets in rows that are whole documents."""
        return entire(self.passages, self.setting.batch_size)


def _batch(windows: list[Document], objective: str, generator: np.random.Generator) -> Batch:
    """Windows of T + 1 bytes → a batch. Both objectives see the same first T bytes."""
    tokens: Ints = np.stack(windows).astype(np.int64)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    if objective == "mlm":
        masked = generator.random(inputs.shape) < MASKED_SHARE
        masked[:, -1] |= ~masked.any(axis=1)  # a short window must have something to score
        targets = np.where(masked, inputs, IGNORED)
        inputs = np.where(masked, MASK, inputs)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))


def train_batch(
    corpus: Corpus, *, seq_len: int, batch_size: int, objective: str, replicate: int, step: int
) -> Batch:
    """The batch of one training step: a pure function of its arguments.

    Windows start anywhere in the training documents laid end to end. Two variants with the same
    arguments see the same bytes, and a run that resumes at a step sees what it would have seen.
    """
    generator = np.random.default_rng([replicate, step])
    stream = corpus.train_stream
    starts = generator.integers(0, len(stream) - seq_len, size=batch_size)
    return _batch([stream[s : s + seq_len + 1] for s in starts], objective, generator)


def held_out(
    documents: tuple[Document, ...], *, seq_len: int, objective: str, max_tokens: int
) -> list[Passage]:
    """What is scored of each held-out document, from its first byte on: the same for every variant and
    replicate. `shares` says how much; the last byte is read by nobody.

    Both objectives read the same bytes, and a byte is masked or not whatever window it is in.
    """
    found = []
    taken = shares([len(document) - 1 for document in documents], seq_len, max_tokens)
    for index, (document, count) in enumerate(zip(documents, taken, strict=True)):
        tokens: Ints = document[: count + 1].astype(np.int64)
        inputs, targets = tokens[:-1], tokens[1:]
        if objective == "mlm" and count:
            masked = np.random.default_rng([0, index]).random(count) < MASKED_SHARE
            masked[-1] |= not masked.any()  # a short document must have something to score
            inputs, targets = np.where(masked, MASK, inputs), np.where(masked, inputs, IGNORED)
        found.append(Passage(inputs, targets))
    return found


def too_short(corpus: Corpus, seq_len: int, *, scored: str | None) -> str | None:
    """Why the corpus cannot fill windows of this length, or None; `scored` is the split to score, if any."""
    if len(corpus.train_stream) <= seq_len:
        have = len(corpus.train_stream)
        return f"data={corpus.name} has {have:,} bytes to train on; seq_len={seq_len:,} needs more"
    if scored and (longest := max(map(len, corpus.split(scored)))) <= seq_len:
        return (
            f"data={corpus.name} has no {scored} document over {longest:,} bytes; "
            f"seq_len={seq_len:,} needs one"
        )
    return None
