"""Held-out documents cut into windows: which targets are scored, and after how much of the document.

Shapes: B batch, T tokens of a window, S tokens from one window to the next, N tokens of a document.

    targets of a document     0 1 2 3 4 5 6 7 8       T = 4, S = 2; a dot is read and not scored
    the first window          0 1 2 3
    the next                      . . 4 5
    the next                          . . 6 7
    the last, moved back                . . . 8

Which targets are scored depends on the documents, T and the number asked for, and on nothing else: not on
the stride, the batch, or whether state is carried. A target is scored once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bench.tasks.base import IGNORED, Batch

Ints = npt.NDArray[np.int64]


class Passage(NamedTuple):
    """The scored part of a document: inputs (N,) and targets (N,). Target i is predicted after input i."""

    inputs: Ints
    targets: Ints


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


def shares(lengths: Sequence[int], seq_len: int, at_most: int) -> list[int]:
    """How many targets of each document are scored, from its first on.

    Documents take turns, the longest first, T targets a turn, until `at_most` are dealt, or T if that is
    more. So the first T of every document come before the second T of any, and where T is so long that
    few documents can have a turn, it is those that fill a window.
    """
    dealt, left = [0] * len(lengths), max(at_most, seq_len)
    turns = sorted(range(len(lengths)), key=lambda k: -lengths[k])
    while left and any(dealt[k] < lengths[k] for k in turns):
        for k in turns:
            more = min(seq_len, lengths[k] - dealt[k], left)
            dealt[k] += more
            left -= more
    return dealt


def cut(lengths: Sequence[int], seq_len: int, stride: int) -> list[Window]:
    """Windows of T tokens over documents of these lengths, each S tokens further than the one before.

    A document's first window scores all its targets and each later one those that are new: its last S. The
    last ends where the document does; it is T tokens long, like all others, and scores fewer. Only a
    document of fewer than T tokens is a shorter window, which every variant can read: of parameters that
    are made for T positions, the first are used.
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
    """Fewest tokens of a window that precede a target, where it is none of its document's first T."""
    return seq_len - stride + 1


def windowed(passages: Sequence[Passage], seq_len: int, stride: int, batch_size: int) -> Iterator[Batch]:
    """The windows of `cut` in batches, each of windows of one length."""

    def length(window: Window) -> int:
        return window.length

    windows = cut([len(passage.targets) for passage in passages], seq_len, stride)
    for _, alike in groupby(sorted(windows, key=length, reverse=True), key=length):
        same = list(alike)
        for i in range(0, len(same), batch_size):
            yield _batch(passages, same[i : i + batch_size])


def entire(passages: Sequence[Passage], batch_size: int) -> Iterator[Batch]:
    """Whole documents side by side, for models that carry state from each document's first token.

    Those of similar length share a batch. Where one ends before the longest of its batch, zeros follow,
    and nothing after its end is scored.
    """
    lengths = [len(passage.targets) for passage in passages]
    whole = [Window(k, 0, length, 0) for k, length in enumerate(lengths) if length]
    whole.sort(key=lambda window: window.length, reverse=True)
    for i in range(0, len(whole), batch_size):
        yield _batch(passages, whole[i : i + batch_size])


def _batch(passages: Sequence[Passage], windows: Sequence[Window]) -> Batch:
    """Windows as rows, padded to the longest; targets outside [scored, stop) are not scored."""
    shape = len(windows), max(window.length for window in windows)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
    for row, (document, start, stop, scored) in enumerate(windows):
        inputs[row, : stop - start] = passages[document].inputs[start:stop]
        targets[row, scored - start : stop - start] = passages[document].targets[scored:stop]
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
