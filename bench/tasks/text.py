"""Text: byte-level language modelling, causal or masked, on the documents of a corpus.

Shapes: B batch, T tokens. Tokens are bytes 0–255; MASK is one more symbol, read by masked models only.

    clm   inputs   T h e _ q u i c k      targets  h e _ q u i c k _
    mlm   inputs   T h # _ q u # c k      targets  . . e . . . i . .     (. is not scored)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from bench.corpora import Corpus, Document
from bench.tasks.base import IGNORED, Batch
from bench.windows import Passage, shares

MASK = 256
VOCABULARY = 257
MASKED_SHARE = 0.15
"""Share of the tokens that a masked model must fill in (Devlin 2018, arXiv:1810.04805). Every one of
them is replaced by MASK; the paper's 80/10/10 mixture is for fine-tuning, which nobody does here."""

Ints = npt.NDArray[np.int64]


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
