"""n-gram tables over bytes, interpolated: what a model of local statistics reaches on the same text.

Shapes: N grams, K distinct grams, C distinct contexts, Q scored bytes.

Witten and Bell (1991, "The zero-frequency problem", method C), interpolated as in Chen and Goodman (1998,
TR-10-98, §2.5): for a byte w after a context h of k − 1 bytes, with h' the context without its first byte,

    p_k(w | h) = (c(h w) + t(h) p_{k−1}(w | h')) / (c(h) + t(h)),     p_0(w) = 1 / 256

c counts occurrences, c(h) = Σ_w c(h w), and t(h) is the number of distinct bytes that followed h. After a
context that never occurred, p_k is p_{k−1}. There is nothing to tune.

A gram is one integer: its last byte is in the lowest 8 bits, the byte before in the next 8. Grams are counted
in chunks, so the memory is that of a chunk and of the distinct grams, not of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bench.corpora import Document

MAX_ORDER = 5
CHUNK = 2**22
"""Maximum number of bytes whose grams are in memory at the same time."""

Grams = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]
_BYTE = np.uint64(8)


class Piece(NamedTuple):
    """Bytes of a text. Those from `start` on count; those before are only context, and nothing is known
    before them."""

    text: Document
    start: int = 0


class Table(NamedTuple):
    """Counts of one order, ordered by gram."""

    grams: Grams
    """(K,) the distinct grams."""
    counts: Floats
    """(K,) c(h w) of each."""
    contexts: Grams
    """(C,) the distinct contexts of these grams: a gram without its last byte."""
    totals: Floats
    """(C,) c(h) of each."""
    kinds: Floats
    """(C,) t(h) of each."""


def learn(pieces: Sequence[Piece], max_order: int = MAX_ORDER) -> list[Table]:
    """Return the tables of order 1 to `max_order` of these pieces; the pieces are not connected."""
    return [_table(pieces, order) for order in range(1, max_order + 1)]


def bits_per_byte(tables: Sequence[Table], pieces: Sequence[Piece]) -> list[float]:
    """Return the mean −log₂ p of the bytes that count, for each order of the tables, beginning with 1.

    A byte with fewer bytes before it in its piece than an order reads is predicted by the highest order that
    it allows."""
    sums, scored = np.zeros(len(tables)), 0
    for text, place, counted in _chunks(pieces, len(tables)):
        probability: Floats = np.full(int(counted.sum()), 1 / 256)
        known, scored = place[counted], scored + len(probability)
        for index, table in enumerate(tables):
            probability = _refine(probability, table, _grams(text, index + 1)[counted], known >= index)
            # float64, because many numbers are added
            sums[index] -= np.log2(probability).sum()
    return [float(total / scored) for total in sums]


def _table(pieces: Sequence[Piece], order: int) -> Table:
    grams: Grams = np.zeros(0, dtype=np.uint64)
    counts: Floats = np.zeros(0)
    for text, place, counted in _chunks(pieces, order):
        found = np.unique(_grams(text, order)[counted & (place >= order - 1)], return_counts=True)
        both = np.concatenate([grams, found[0]])
        grams, index = np.unique(both, return_inverse=True)
        counts = _sums(index, np.concatenate([counts, found[1]]))
    contexts, index = np.unique(grams >> _BYTE, return_inverse=True)
    kinds = _sums(index, np.ones(len(grams)))
    return Table(grams, counts, contexts, totals=_sums(index, counts), kinds=kinds)


def _sums(index: npt.NDArray[np.int64], values: Floats) -> Floats:
    """Return the sum of the values of each index; every index up to the highest occurs."""
    return np.asarray(np.bincount(index, values), dtype=np.float64)


def _refine(lower: Floats, table: Table, grams: Grams, known: npt.NDArray[np.bool_]) -> Floats:
    """(Q,) p_k, given `lower` (Q,) = p_{k−1} and the grams; it is `lower` where the context is not `known`,
    or never occurred."""
    if not len(table.grams):  # every piece was shorter than this order
        return lower
    context, seen = _find(table.contexts, grams >> _BYTE)
    gram, counted = _find(table.grams, grams)
    use = known & seen
    count = np.where(counted, table.counts[gram], 0.0)[use]
    total, kinds = table.totals[context[use]], table.kinds[context[use]]
    refined = lower.copy()
    refined[use] = (count + kinds * lower[use]) / (total + kinds)
    return refined


def _find(among: Grams, wanted: Grams) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the place of each wanted value, and whether it is there; `among` is sorted and not empty."""
    place = np.minimum(np.searchsorted(among, wanted), len(among) - 1)
    return place, among[place] == wanted


def _grams(text: Document, order: int) -> Grams:
    """(N,) the gram that ends at each byte; the first order − 1 lack bytes and are not meaningful."""
    wide = text.astype(np.uint64)
    grams: Grams = wide.copy()
    for back in range(1, order):
        grams[back:] |= wide[:-back] << np.uint64(8 * back)
    return grams


def _chunks(
    pieces: Iterable[Piece], order: int
) -> Iterator[tuple[Document, npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """Yield pieces in chunks: the bytes, the place of each in its piece, and whether it counts."""
    chunk: list[Piece] = []
    size = 0
    for piece in _divided(pieces, order):
        if chunk and size + len(piece.text) > CHUNK:
            yield _joined(chunk)
            chunk, size = [], 0
        chunk.append(piece)
        size += len(piece.text)
    if chunk:
        yield _joined(chunk)


def _divided(pieces: Iterable[Piece], order: int) -> Iterator[Piece]:
    """Divide long pieces; each part repeats, as context, the bytes before it that an order reads."""
    for text, start in pieces:
        for first in range(start, len(text), CHUNK):
            begin = max(0, first - order + 1)
            yield Piece(text[begin : first + CHUNK], first - begin)


def _joined(chunk: Sequence[Piece]) -> tuple[Document, npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    text = np.concatenate([piece.text for piece in chunk])
    place = np.concatenate([np.arange(len(piece.text)) for piece in chunk])
    starts = np.repeat([piece.start for piece in chunk], [len(piece.text) for piece in chunk])
    return text, place, place >= starts
