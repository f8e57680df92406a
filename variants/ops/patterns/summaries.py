"""Summary positions of the fixed pattern (Child 2019, arXiv:1904.10509, §4.3): c tokens of each block.

Shapes: T tokens, H heads; l the length of a block (the stride), c summary positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from variants.ops.patterns.masks import Rule
from variants.ops.patterns.strided_parts import StridedTokens

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Heads [first, last), whose summary positions begin at `offset`, `offset` + `step`, … in a block."""

    first: int
    last: int
    offset: int
    step: int

    @property
    def heads(self) -> tuple[int, int]:
        """The first head, and the head after the last."""
        return self.first, self.last


@dataclass(frozen=True, kw_only=True)
class Positions:
    """c summary positions in each block of `stride` tokens, for heads [first, last).

    shared: the last c positions for all heads. Otherwise the last head has the end of a block, the head
    before it the c tokens before, and so on; at the start of the block it continues at the end.
    """

    stride: int
    c: int
    first: int
    last: int
    shared: bool

    @property
    def heads(self) -> tuple[int, int]:
        """The first head, and the head after the last."""
        return self.first, self.last

    def offset(self, head: Index) -> Index:
        """The offset in a block at which the positions of a head begin (an int, or a tensor of heads)."""
        if self.shared:
            return head * 0 + (self.stride - self.c)
        from_last = (self.last - 1 - head) % (self.stride // self.c)
        return self.stride - self.c * (1 + from_last)

    def runs(self) -> list[Run]:
        """The heads, grouped so that the offsets of their summaries have a constant step."""
        if self.shared:
            return [Run(first=self.first, last=self.last, offset=self.stride - self.c, step=0)]
        runs, last = [], self.last
        while last > self.first:
            count = min(self.stride // self.c, last - self.first)
            offset = self.stride - self.c * count
            runs.append(Run(first=last - count, last=last, offset=offset, step=self.c))
            last -= count
        return runs

    def of_blocks(self, run: Run, first: int, count: int) -> StridedTokens:
        """The summary positions of `count` blocks from block `first` on, as one set of keys."""
        start = first * self.stride + run.offset
        return StridedTokens(start=start, rows=count, row_step=self.stride, run=self.c, head_step=run.step)

    def append_to(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the summaries of all complete blocks to k and v (B, H, T, D): (B, H, T + ⌊T/l⌋ · c, D).

        For accelerators: so, no matter how the offsets of heads differ, summaries are neighbours, and all
        heads read them in one operation.
        """
        (heads, seq_len), stride, c = k.shape[1:3], self.stride, self.c
        # by shapes alone, because a copy of numbers from the host would wait for the device
        offset_count = 1 if self.shared else stride // c
        offsets = torch.arange(stride - c * offset_count, stride, c, device=k.device)
        repeats = -(-heads // offset_count)
        offsets = (offsets.repeat(repeats) if repeats > 1 else offsets)[-heads:]  # (H,)
        firsts = torch.arange(seq_len, device=k.device).unfold(0, stride, stride)[:, :c]  # (blocks, c)
        tokens = (firsts[..., None] + offsets).flatten(0, 1)
        rows = tokens[None, :, :, None].expand(k.shape[0], -1, -1, k.shape[3])
        k, v = (torch.cat([t, t.gather(1, rows)], dim=1) for t in (k.transpose(1, 2), v.transpose(1, 2)))
        return k.transpose(1, 2), v.transpose(1, 2)


@dataclass(frozen=True)
class Summaries(Rule):
    """Keys at the summary positions of a head, in all blocks."""

    positions: Positions
    short_block: tuple[int, int] | None
    """[begin, end) of a shorter last block whose summary positions are its last c tokens, or None."""

    @property
    def period(self) -> int | None:
        """The length of a block, without a shorter one at the end."""
        return self.positions.stride if self.short_block is None else None

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Does not depend on the query."""
        stride, c = self.positions.stride, self.positions.c
        # with shared positions the result does not depend on the head
        offset: Tensor | int = stride - c if self.positions.shared else self.positions.offset(head)
        in_block = j % stride
        regular = (in_block >= offset) & (in_block < offset + c)
        if self.short_block is None:
            return regular & (i == i)  # broadcast to the shape of i
        begin, end = self.short_block
        return ((regular & (j < begin)) | ((j >= begin) & (j >= end - c))) & (i == i)
