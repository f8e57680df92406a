"""Text: byte-level language modelling, causal or masked, on the documents of a corpus.

Shapes: B batch, T tokens. Tokens are bytes 0–255; MASK is one more symbol, read by masked models only.

    clm   inputs   T h e _ q u i c k      targets  h e _ q u i c k _
    mlm   inputs   T h # _ q u # c k      targets  . . e . . . i . .     (. is not scored)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from bench import corpora
from bench.corpora import Corpus, Document
from bench.tasks.base import IGNORED, Batch, Setting, Task, TaskConfig

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
    """A file, folder or glob, for data=files."""

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
        self.corpus = corpora.load(setting.data, config.path)

    @classmethod
    def sha256(cls, config: TaskConfig, data: str) -> str:
        """The corpus's own: of its documents, wherever they lie. Raises corpora.CorpusError."""
        assert isinstance(config, TextConfig)
        return corpora.load(data, config.path).sha256

    def unsupported(self) -> str | None:
        """A corpus that is too short."""
        return too_short(self.corpus, self.setting.seq_len, quality=self.setting.test_tokens > 0)

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

    def test_batches(self) -> Iterator[Batch]:
        """Windows of the test documents."""
        return held_out_batches(
            self.corpus.test,
            seq_len=self.setting.seq_len,
            batch_size=self.setting.batch_size,
            objective=self.objective,
            max_tokens=self.setting.test_tokens,
        )


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


def held_out_batches(
    documents: tuple[Document, ...], *, seq_len: int, batch_size: int, objective: str, max_tokens: int
) -> Iterator[Batch]:
    """Windows of T + 1 bytes of held-out documents, side by side from each document's first byte.

    No window crosses from one document to the next. Up to `max_tokens` targets are taken in rounds,
    the first window of every document, then the second, …: the same for every variant and replicate.
    The last batch may be smaller.
    """
    generator = np.random.default_rng(0)  # masked positions too are the same for everyone
    windows = _windows(documents, seq_len, max(1, max_tokens // seq_len))
    for i in range(0, len(windows), batch_size):
        yield _batch(windows[i : i + batch_size], objective, generator)


def _windows(documents: tuple[Document, ...], seq_len: int, at_most: int) -> list[Document]:
    found: list[Document] = []
    longest = max(map(len, documents))
    for start in range(0, longest - seq_len, seq_len):
        for document in documents:
            if start + seq_len < len(document):
                found.append(document[start : start + seq_len + 1])
                if len(found) == at_most:
                    return found
    return found


def too_short(corpus: Corpus, seq_len: int, *, quality: bool) -> str | None:
    """Why the corpus cannot fill windows of this length, or None."""
    if len(corpus.train_stream) <= seq_len:
        have = len(corpus.train_stream)
        return f"data={corpus.name} has {have:,} bytes to train on; seq_len={seq_len:,} needs more"
    longest = max(map(len, corpus.test))
    if quality and longest <= seq_len:
        return (
            f"data={corpus.name} has no test document over {longest:,} bytes; seq_len={seq_len:,} needs one"
        )
    return None
