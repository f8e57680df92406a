"""Blocks of keys that blocks of queries read: global ones, neighbours and random ones.

Shapes: H heads, n rows, which are blocks of queries, S slots, which are blocks of keys of one row.

Random blocks are a pure function of a key, the head and the row, so there is no table of all of them, and a
prefix of a causal sequence is read as in the complete sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from variants.ops.patterns.masks import Rule

WORD = 2**32 - 1
CACHED = 128
"""Number of cached results of `groups_of_rows`."""


Number = TypeVar("Number", int, Tensor)


def mixed(x: Number) -> Number:
    """A bijection of integers below 2³² in which each bit of the argument changes half of the bits.

    An xorshift-multiply hash. Its multipliers are below 2³¹, so that no product exceeds an int64.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & WORD
    return x ^ (x >> 15)


class Span(NamedTuple):
    """The neighbours low … high of rows that are not global."""

    low: Tensor
    high: Tensor
    candidates: Tensor
    """Number of blocks that may be random ones."""


class RowGroup(NamedTuple):
    """Neighbouring rows with equally many slots, at the same places except for the random ones."""

    first: int
    n: int
    queries: int
    """Tokens of a row; fewer than a block only in a last one."""
    below: int
    above: int
    """The neighbours are the row minus `below` to the row plus `above`."""
    random: int
    short: int
    """Tokens of a shorter last block that is read besides the slots, or 0."""


@dataclass(frozen=True, kw_only=True)
class BlockRule(Rule):
    """A row reads global blocks, its neighbours and random blocks; global rows read everything.

    The causal form reads no later block; within the own block, the caller adds causality.
    """

    block: int
    neighbours: int
    """Neighbours on each side."""
    globals_first: int
    globals_last: int = 0
    """Global blocks at the start and at the end of the sequence."""
    random: int
    seed: int
    layer: int
    seq_len: int | None = None
    """Tokens of the sequence, or None for the causal form, which does not depend on it."""

    @property
    def rows(self) -> int:
        """Number of blocks of a bidirectional sequence, the last of which may be shorter."""
        assert self.seq_len is not None
        return -(-self.seq_len // self.block)

    @property
    def end(self) -> int:
        """The block after the last one that may be random. A shorter last block is never random."""
        assert self.seq_len is not None
        return min(self.rows - self.globals_last, self.seq_len // self.block)

    def span(self, row: Tensor) -> Span:
        """Neighbours and number of candidates of rows that are not global."""
        low = (row - self.neighbours).clamp(min=self.globals_first)
        before = low - self.globals_first
        if self.seq_len is None:
            return Span(low, row, before)
        high = (row + self.neighbours).clamp(max=self.rows - self.globals_last - 1)
        return Span(low, high, before + (self.end - 1 - high).clamp(min=0))

    def picks(self, head: Tensor, row: Tensor) -> list[Tensor]:
        """The random blocks of each head and row: distinct candidates, or −1 where there are too few.

        Floyd's method: the k-th pick is uniform among the first n candidates, and the n-th if that one is
        taken. So all sets are equally likely, up to the remainder of a 32-bit number by n.
        """
        if not self.random:
            return []
        low, high, candidates = self.span(row)
        key = mixed((mixed(self.seed & WORD) + self.layer) & WORD)  # on the host
        state = mixed((mixed((row + key) & WORD) + head) & WORD)
        picked: list[Tensor] = []
        blocks: list[Tensor] = []
        for k in range(self.random):
            top = candidates - self.random + k
            pick = mixed((state + k) & WORD) % (top + 1).clamp(min=1)
            for other in picked:
                pick = torch.where(pick == other, top, pick)
            picked.append(pick)
            block = pick + self.globals_first
            if self.seq_len is not None:
                block = torch.where(block < low, block, block - low + high + 1)
            blocks.append(torch.where(top < 0, -1, block))
        return blocks

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whether the block of j is global, near or random for the block of i, or that of i is global."""
        row, block = i // self.block, j // self.block
        low, high, _ = self.span(row)
        allowed = ((block >= low) & (block <= high)) | (block < self.globals_first)
        if self.seq_len is not None:
            last = self.rows - self.globals_last
            allowed = allowed | (block >= last) | (row < self.globals_first) | (row >= last)
        for pick in self.picks(head, row):
            allowed = allowed | (block == pick)
        return allowed

    def table(self, group: RowGroup, heads: int, device: torch.device) -> Tensor:
        """The slots (H, n, S) of a group of rows, without a shorter block. The own block of a causal row is
        the last one."""
        head = torch.arange(heads, device=device)[:, None]
        row = torch.arange(group.first, group.first + group.n, device=device)
        slots = [torch.full_like(row, block) for block in range(self.globals_first)]
        slots += self.picks(head, row)[self.random - group.random :] if group.random else []
        slots += [row + offset for offset in range(-group.below, group.above + 1)]
        if self.seq_len is not None:
            slots += [torch.full_like(row, n) for n in range(self.rows - self.globals_last, self.rows)]
        if group.short:
            slots.pop()
        shape = heads, group.n
        return torch.stack([s.expand(shape) for s in slots], -1) if slots else row.new_empty(*shape, 0)

    def earlier_blocks(self, row: int, heads: int, device: torch.device) -> Tensor:
        """The slots (H, S) of a causal row that is not among the `dense_rows`, without its own block."""
        own = RowGroup(row, 1, 1, self.neighbours, 0, self.random, short=1)
        return self.table(own, heads, device)[:, 0]

    def dense_rows(self, seq_len: int) -> int:
        """The first rows of a causal sequence of `seq_len` tokens, which read everything up to themselves."""
        if self.seq_len is not None:
            return 0
        return min(-(-seq_len // self.block), self.globals_first + self.neighbours + self.random + 1)

    def pairs(self, seq_len: int) -> int:
        """The number of allowed pairs of one head."""
        first, causal = self.dense_rows(seq_len), self.seq_len is None
        if causal:
            dense = min(seq_len, first * self.block)
            total = dense * (dense + 1) // 2
        else:
            last = (self.rows - self.globals_last) * self.block
            queries = min(seq_len, self.globals_first * self.block) + max(0, seq_len - last)
            total = queries * seq_len
        for group in groups_of_rows(self, first, seq_len):
            slots = self.globals_first + self.globals_last + group.random + group.below + group.above + 1
            keys = (slots - bool(group.short)) * self.block + group.short
            later = group.queries * (group.queries - 1) // 2 if causal else 0
            total += group.n * (group.queries * keys - later)
        return total


@lru_cache(maxsize=CACHED)
def groups_of_rows(rule: BlockRule, first: int, seq_len: int) -> tuple[RowGroup, ...]:
    """The rows from `first` on that are not global, in groups."""
    full, rest = divmod(seq_len, rule.block)
    rows = full + bool(rest)

    def shape(row: int) -> tuple[int, int, int, int, int]:
        low = max(row - rule.neighbours, rule.globals_first)
        high = row if rule.seq_len is None else min(row + rule.neighbours, rows - rule.globals_last - 1)
        candidates = low - rule.globals_first
        if rule.seq_len is not None:
            candidates += max(0, rule.end - 1 - high)
        reads_short = rest > 0 and (high == full or rule.globals_last > 0)
        queries = rest if row == full else rule.block
        return queries, row - low, high - row, min(rule.random, candidates), rest if reads_short else 0

    groups = []
    start = max(first, rule.globals_first)
    for shape_of, alike in groupby(range(start, rows - rule.globals_last), key=shape):
        queries, *others = shape_of
        n = len(list(alike))
        groups.append(RowGroup(start, n, queries, *others))
        start += n
    return tuple(groups)
