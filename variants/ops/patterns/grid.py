"""A sequence as a grid, row after row, and rectangles of it.

Shapes: T tokens.

Token t is in row ⌊t / width⌋ and column t mod width. The last row may be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from variants.ops.patterns.masks import Rule
from variants.ops.patterns.rectangles import Rectangle
from variants.ops.patterns.strided_parts import StridedTokens

CACHED = 128
"""Number of cached results of `memory_rectangles`."""


def default_width(seq_len: int) -> int:
    """The power of two nearest to √T."""
    return 1 << math.floor(math.log2(seq_len) / 2 + 0.5)


@dataclass(frozen=True, kw_only=True)
class Memory(Rule):
    """The grid is divided into blocks of `height` rows and `columns` columns. A query reads the keys of its
    block, and of `above` rows above it, `below` rows below it and `beside` columns on each side of it."""

    width: int
    height: int
    columns: int
    above: int
    below: int
    beside: int

    @property
    def period(self) -> int:
        """The tokens of the rows of a block."""
        return self.width * self.height

    @property
    def reach(self) -> int:
        """The distance between the first query of a block and the last key, or the other way round."""
        rows = self.height - 1 + max(self.above, self.below)
        return rows * self.width + min(self.width, self.columns + self.beside) - 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether the row and the column of the key are in the memory of the block of the query."""
        down = j // self.width - i // self.width // self.height * self.height
        right = j % self.width - i % self.width // self.columns * self.columns
        in_rows = (down >= -self.above) & (down < self.height + self.below)
        return in_rows & (right >= -self.beside) & (right < self.columns + self.beside)


@dataclass(frozen=True)
class _Strip:
    """Columns [left, right) of `rows` rows, of which `row` is the first."""

    row: int
    rows: int
    left: int
    right: int

    def tokens(self, width: int, groups: int = 1, apart: int = 0) -> StridedTokens:
        """The tokens, in groups at a distance of `apart` rows."""
        return StridedTokens(
            start=self.row * width + self.left,
            groups=groups,
            group_step=apart * width,
            rows=self.rows,
            row_step=width,
            run=self.right - self.left,
        )


@lru_cache(maxsize=CACHED)
def memory_rectangles(
    memory: Memory, rule: Rule, seq_len: int, heads: tuple[int, int]
) -> tuple[Rectangle, ...]:
    """Rectangles that contain each pair that `rule` allows exactly once; `rule` allows no pair outside
    `memory`."""
    return tuple(_rectangles(memory, rule, seq_len, heads))


def _rectangles(memory: Memory, rule: Rule, seq_len: int, heads: tuple[int, int]) -> Iterator[Rectangle]:
    width, height = memory.width, memory.height
    full, rest = divmod(seq_len, width)
    first = -(-memory.above // height)
    stop = max(first, (full - memory.below) // height)
    apart = -(-(memory.above + height + memory.below) // height)  # so that groups have no common key
    for left in range(0, min(width, seq_len), memory.columns):
        right = min(left + memory.columns, width)
        near = max(0, left - memory.beside), min(width, right + memory.beside)
        for block in range(first, min(stop, first + apart)):
            queries = _Strip(block * height, height, left, right)
            keys = _Strip(
                block * height - memory.above, memory.above + height + memory.below, near[0], near[1]
            )
            groups = len(range(block, stop, apart))
            yield from _rectangle(rule, queries, keys, width, heads, groups, apart * height)
        for block in (*range(first), *range(stop, -(-seq_len // (width * height)))):
            top, end = block * height, (block + 1) * height
            around = [*_strips(max(0, top - memory.above), end + memory.below, near, full, rest)]
            for queries in _strips(top, end, (left, right), full, rest):
                for keys in around:
                    yield from _rectangle(rule, queries, keys, width, heads)


def _strips(top: int, end: int, columns: tuple[int, int], full: int, rest: int) -> Iterator[_Strip]:
    """The full rows among rows [top, end), and the shorter last row if it is among them."""
    left, right = columns
    if top < min(end, full):
        yield _Strip(top, min(end, full) - top, left, right)
    if top <= full < end and left < min(right, rest):
        yield _Strip(full, 1, left, min(right, rest))


def _rectangle(
    rule: Rule,
    queries: _Strip,
    keys: _Strip,
    width: int,
    heads: tuple[int, int],
    groups: int = 1,
    apart: int = 0,
) -> Iterator[Rectangle]:
    """The rectangle of two strips, if the rule allows some pair."""
    cuts = [strip.tokens(width, groups, apart) for strip in (queries, keys)]
    with _disable_current_modes():
        i, j = (cut.tokens(torch.device("cpu")) for cut in cuts)
        allowed = rule(torch.tensor(0, device="cpu"), i[:, None], j)
        if bool(allowed.any()):
            masked = not bool(allowed.all())
            yield Rectangle(heads=heads, queries=cuts[0], keys=cuts[1], causal=False, masked=masked)
