"""Held-out documents, divided into windows: which targets are scored, and with how much context.

Shapes: B batch, T tokens of a window, S stride (tokens from one window to the next), N tokens of a document.

    targets of a document     0 1 2 3 4 5 6 7 8       T = 4, S = 2; a dot is read but not scored
    the first window          0 1 2 3
    the second                    . . 4 5
        the third                         . . 6 7
        the last, moved back                . . . 8

Which targets are scored depends only on the documents, T and the requested number, and not on the stride, the
batch, or whether state is carried. Each target is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench.tasks.base import IGNORED, Batch

Ids = npt.NDArray[np.integer[Any]]


class Passage(NamedTuple):
    """The scored part of a document: inputs (N,) and targets (N,). Target i is predicted after input i."""

    inputs: Ids
    targets: Ids


class Window(NamedTuple):
    """Tokens [start, stop) of a document; the targets [scored, stop) are scored."""

    document: int
    start: int
    stop: int
    scored: int

    @property
    def length(self) -> int:
        """Tokens in the window."""
        return self.stop - self.start


def scored_counts(lengths: Sequence[int], seq_len: int, at_most: int) -> list[int]:
    """Return the number of targets that are scored of each document, from its first target on.

    Targets are assigned in rounds of T targets per document, the longest document first, until max(at_most,
    T) targets are assigned. Therefore the first T targets of every document come before the second T of any.
    If T is so long that only few documents are scored, these are documents that fill a window.
    """
    dealt, left = [0] * len(lengths), max(at_most, seq_len)
    turns = sorted(range(len(lengths)), key=lambda k: -lengths[k])
    while left and any(dealt[k] < lengths[k] for k in turns):
        for k in turns:
            more = min(seq_len, lengths[k] - dealt[k], left)
            dealt[k] += more
            left -= more
    return dealt


def sliding_windows(lengths: Sequence[int], seq_len: int, stride: int) -> list[Window]:
    """Return windows of T tokens over documents of these lengths, at distances of S tokens.

    The first window of a document scores all its targets, and each later window its new targets: the last S.
    The last window ends at the end of the document; it also has T tokens but scores fewer. Only a document of
    fewer than T tokens has a shorter window. Every variant can read it: of parameters for T positions, the
    first are used.
    """
    found = []
    for document, length in enumerate(lengths):
        stop = scored = 0
        while stop < length:
            stop = min(stop + stride, length) if stop else min(seq_len, length)
            found.append(Window(document, max(0, stop - seq_len), stop, scored))
            scored = stop
    return found


def least_context(seq_len: int, stride: int) -> int:
    """Return the minimum context, in tokens, of targets after the first T of a document."""
    return seq_len - stride + 1


def window_batches(
    passages: Sequence[Passage], seq_len: int, stride: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the windows of `sliding_windows` in batches; all windows of a batch have the same length."""
    windows = sliding_windows([len(passage.targets) for passage in passages], seq_len, stride)
    return batches_of(passages, windows, batch_size)


def batches_of(passages: Sequence[Passage], windows: Sequence[Window], batch_size: int) -> Iterator[Batch]:
    """Yield windows in batches, the longest first; all windows of a batch have the same length."""

    def length(window: Window) -> int:
        return window.length

    for _, group in groupby(sorted(windows, key=length, reverse=True), key=length):
        same = list(group)
        for i in range(0, len(same), batch_size):
            yield _batch(passages, same[i : i + batch_size])


def document_batches(passages: Sequence[Passage], batch_size: int) -> Iterator[Batch]:
    """Yield batches of whole documents, for models that carry state from the first token of each document.

    Documents of similar length share a batch. Shorter ones are padded with zeros, which are not scored.
    """
    lengths = [len(passage.targets) for passage in passages]
    whole = [Window(k, 0, length, 0) for k, length in enumerate(lengths) if length]
    whole.sort(key=lambda window: window.length, reverse=True)
    for i in range(0, len(whole), batch_size):
        yield _batch(passages, whole[i : i + batch_size])


def _batch(passages: Sequence[Passage], windows: Sequence[Window]) -> Batch:
    """Stack windows as rows, padded to the longest; targets outside [scored, stop) are not scored."""
    shape = len(windows), max(window.length for window in windows)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for row, (document, start, stop, scored) in enumerate(windows):
        inputs[row, : stop - start] = passages[document].inputs[start:stop]
        targets[row, scored - start : stop - start] = passages[document].targets[scored:stop]
    return Batch.of(inputs, targets)
