"""Blocks of the fixed pattern, and summaries that other blocks read (Child 2019, arXiv:1904.10509, §4.3).

Shapes: T tokens, H heads; S summaries, which are c of each block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from variants.ops.patterns.summaries import Positions


@dataclass(frozen=True)
class Blocks:
    """The blocks of a sequence, its strips of `width` blocks, and the summaries that blocks read."""

    seq_len: int
    positions: Positions
    causal: bool

    @cached_property
    def ends(self) -> list[int]:
        """The token after the last of each block."""
        stride = self.positions.stride
        return [min(begin + stride, self.seq_len) for begin in range(0, self.seq_len, stride)]

    def begin(self, block: int) -> int:
        """The first token of a block."""
        return block * self.positions.stride

    def length(self, block: int) -> int:
        """Number of tokens of a block."""
        return self.ends[block] - self.begin(block)

    @cached_property
    def strips(self) -> list[range]:
        """The blocks of each strip."""
        count = len(self.ends)
        width = math.isqrt(count - 1) + 1
        return [range(first, min(first + width, count)) for first in range(0, count, width)]

    @cached_property
    def offsets(self) -> Tensor:
        """Where the summaries of each head begin in a block: (H,)."""
        return torch.tensor([self.positions.offset(head) for head in range(*self.positions.heads)])

    @cached_property
    def tokens(self) -> Tensor:
        """(S, H): the summaries that other blocks read, block by block.

        A causal model reads none in a shorter block, which is the last one; otherwise they are its last c
        tokens.
        """
        stride, c = self.positions.stride, self.positions.c
        full = self.seq_len // stride
        begins = torch.arange(full)[:, None, None] * stride + self.offsets
        tokens = (begins + torch.arange(c)[:, None]).flatten(0, 1)
        last = range(max(full * stride, self.seq_len - c), 0 if self.causal else self.seq_len)
        return torch.cat(
            [tokens, torch.tensor(last, dtype=torch.int64)[:, None].expand(-1, len(self.offsets))]
        )

    def ids(self, blocks: range) -> Tensor:
        """The rows of `tokens` of some blocks."""
        first, last = (min(end * self.positions.c, len(self.tokens)) for end in (blocks.start, blocks.stop))
        return torch.arange(first, last)

    @cached_property
    def own_of_last(self) -> list[list[int]]:
        """For each head, the summaries of a shorter last block, which only this block reads; causal."""
        begin, end, stride = self.begin(len(self.ends) - 1), self.ends[-1], self.positions.stride
        firsts = [begin + offset for offset in self.offsets.tolist()]
        short = end - begin < stride
        return [list(range(first, min(first + self.positions.c, end))) if short else [] for first in firsts]

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Token and head of each key that is copied: first row s of `tokens` for head h, as number s · H + h,
        and then, in a causal model, `own_of_last`."""
        heads = len(self.offsets)
        tokens, of_head = self.tokens.flatten(), torch.arange(heads).repeat(len(self.tokens))
        if not self.causal:
            return tokens, of_head
        last = [(token, head) for head in range(heads) for token in self.own_of_last[head]]
        more = torch.tensor(last, dtype=torch.int64).reshape(-1, 2)
        return torch.cat([tokens, more[:, 0]]), torch.cat([of_head, more[:, 1]])

    def own_numbers(self, block: int, head: int) -> Tensor:
        """The numbers among `pairs` of the summaries of a block, for one head of a causal model."""
        heads, c = len(self.offsets), self.positions.c
        if self.length(block) == self.positions.stride:
            return torch.arange(block * c, (block + 1) * c) * heads + head
        first = len(self.tokens) * heads + sum(map(len, self.own_of_last[:head]))
        return torch.arange(first, first + len(self.own_of_last[head]))
