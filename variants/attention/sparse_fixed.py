"""Sparse Transformer, fixed pattern (Child 2019, arXiv:1904.10509, §4.3).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride, c summary positions of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from variants.knobs import knob
from variants.ops.factorised import Role, SparseAttention, SparseConfig
from variants.ops.masks import Rule, SameBlock
from variants.ops.strided_parts import Part, StridedTokens, piece_size
from variants.ops.tile_size import Sizes

Index = TypeVar("Index", int, Tensor)
STRIPS = Sizes(cpu=32, accelerator=8)
"""Strips of queries, each with one rectangle of earlier summaries; n strips compute about 1/n more pairs."""


@dataclass(frozen=True, kw_only=True)
class SparseFixedConfig(SparseConfig):
    """Knobs of the fixed pattern. If stride is null, it is at least c."""

    c: int = knob(8, least=1, unit="positions")
    """Summary positions in each block of `stride` tokens. The paper uses 8, 16 or 32, and 32 for text (§4.3,
    §7.2). The cost grows with it: at 16,384 tokens with l = 128, c = 32 needs a quarter of the pairs of dense
    attention, c = 8 a fourteenth."""
    subblocks: Literal["distinct", "shared"] = "distinct"
    """Whether each head has its own summary positions. distinct: as the paper recommends, each head has c
    other positions: the last head has the end of a block, the head before it the c tokens before, and so on;
    at the start of the block it continues at the end. shared: all heads have the last c positions."""

    def __post_init__(self) -> None:
        self.require("c", self.stride is None or self.c <= self.stride, f"at most stride={self.stride}")

    def stride_for(self, seq_len: int) -> int:
        """The stride of a layer built for sequences up to seq_len."""
        return max(self.c, super().stride_for(seq_len))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Heads [first, last), whose summary positions begin at `offset`, `offset` + `step`, … in a block."""

    first: int
    last: int
    offset: int
    step: int

    @property
    def heads(self) -> tuple[int, int]:
        return self.first, self.last


def _offset(config: SparseFixedConfig, role: Role, head: Index, stride: int) -> Index:
    """The offset in a block at which the summary positions of a head begin (an int, or a tensor of heads)."""
    if config.subblocks == "shared":
        return head * 0 + (stride - config.c)
    from_last = (role.last - 1 - head) % (stride // config.c)
    return stride - config.c * (1 + from_last)


@dataclass(frozen=True)
class Summaries(Rule):
    """Keys at the summary positions of a head, in all blocks."""

    config: SparseFixedConfig
    role: Role
    stride: int
    short_block: tuple[int, int] | None
    """[begin, end) of a shorter last block whose summary positions are its last c tokens, or None."""

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Does not depend on the query."""
        if self.config.subblocks == "shared":  # does not depend on the head
            offset: Tensor | int = self.stride - self.config.c
        else:
            offset = _offset(self.config, self.role, head, self.stride)
        in_block = j % self.stride
        regular = (in_block >= offset) & (in_block < offset + self.config.c)
        if self.short_block is None:
            return regular & (i == i)  # broadcast to the shape of i
        begin, end = self.short_block
        return ((regular & (j < begin)) | ((j >= begin) & (j >= end - self.config.c))) & (i == i)


class SparseFixed(SparseAttention):
    """A token reads its own block of l tokens (local factor), and c summary positions of every block
    (long-range factor).

    With the long-range factor alone, a token before the first summary position has no key: its output is 0,
    and only the residual connection passes it on. In bidirectional models, which are not in the paper, both
    factors extend to later tokens. If the last block is shorter, its summary positions are its last c tokens
    for every head. Otherwise no other block could read it.
    """

    Config = SparseFixedConfig
    config: SparseFixedConfig
    flop_overhead_reason = (
        "a strip of queries computes scores with all summaries of its blocks, or a block with all its keys, "
        "some masked"
    )

    def _runs(self, role: Role) -> list[_Run]:
        """The heads of a role, grouped so that the offsets of their summaries have a constant step."""
        stride, c = self.stride, self.config.c
        if self.config.subblocks == "shared":
            return [_Run(first=role.first, last=role.last, offset=stride - c, step=0)]
        runs, last = [], role.last
        while last > role.first:
            count = min(stride // c, last - role.first)
            runs.append(_Run(first=last - count, last=last, offset=stride - c * count, step=c))
            last -= count
        return runs

    def _offset(self, role: Role, head: int) -> int:
        """The offset in a block at which the summary positions of a head begin."""
        return _offset(self.config, role, head, self.stride)

    def _summaries(self, run: _Run, first: int, count: int) -> StridedTokens:
        """The summary positions of `count` blocks from block `first` on, as one set of keys."""
        stride = self.stride
        start = first * stride + run.offset
        return StridedTokens(start=start, rows=count, row_step=stride, run=self.config.c, head_step=run.step)

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """The parts of each role; not from tiles of the rule, which would contain few summary positions."""
        return [
            part
            for role in self.roles
            for part in self._role_parts(seq_len, role, causal=causal, device=device)
        ]

    def _role_parts(self, seq_len: int, role: Role, *, causal: bool, device: torch.device) -> list[Part]:
        """Blocks, then summaries. Pairs that belong to both are computed where it is cheaper."""
        if role.factor == "local":
            return self._blocks(seq_len, role.first, role.last, causal)
        if causal:
            earlier = [p for run in self._runs(role) for p in self._earlier(seq_len, run, device)]
            if role.factor == "merged":
                return self._blocks(seq_len, role.first, role.last, causal) + earlier
            return earlier + self._own_summaries(seq_len, role, device)
        parts = self._blocks_without_summaries(seq_len, role, device) if role.factor == "merged" else []
        return parts + self._all_summaries(seq_len, role, device)

    def _blocks(self, seq_len: int, first: int, last: int, causal: bool) -> list[Part]:
        """Each block reads itself."""
        stride, heads = self.stride, (first, last)
        blocks, remainder = divmod(seq_len, stride)
        full = StridedTokens(start=0, groups=blocks, group_step=stride, run=stride)
        short = StridedTokens(start=blocks * stride, run=remainder)
        parts = [Part(heads=heads, queries=full, keys=full, causal=causal)] if blocks else []
        return parts + ([Part(heads=heads, queries=short, keys=short, causal=causal)] if remainder else [])

    def _earlier(self, seq_len: int, run: _Run, device: torch.device) -> list[Part]:
        """Summaries of earlier blocks: for each strip a staircase of its own blocks, and a rectangle of all
        blocks before the strip."""
        stride, c = self.stride, self.config.c
        blocks, remainder = divmod(seq_len, stride)
        count = blocks if remainder else blocks - 1  # query block n + 1 reads key blocks 0 … n, n < count
        if count < 1:
            return []
        width = -(-count // STRIPS.on(self.device_type))  # blocks in a strip
        full, last_width = divmod(count, width)
        if remainder and not last_width:  # the last strip ends in a shorter block
            full, last_width = full - 1, width
        index = torch.arange(width, device=device)
        staircase = index[:, None] >= index[None, :]
        mask = staircase.repeat_interleave(stride, 0).repeat_interleave(c, 1) if width > 1 else None
        parts = []
        if full:
            queries = StridedTokens(start=stride, groups=full, group_step=width * stride, run=width * stride)
            keys = self._summaries(run, 0, width)
            keys = StridedTokens(**{**keys.__dict__, "groups": full, "group_step": width * stride})
            parts.append(Part(heads=run.heads, queries=queries, keys=keys, mask=mask))
        start = (full * width + 1) * stride
        if last_width:
            queries = StridedTokens(start=start, run=seq_len - start)
            keys = self._summaries(run, full * width, last_width)
            last_mask = None if mask is None else mask[: queries.run, : keys.length]
            parts.append(Part(heads=run.heads, queries=queries, keys=keys, mask=last_mask))
        for strip in range(1, full + bool(last_width)):
            start = (strip * width + 1) * stride
            queries = StridedTokens(start=start, run=min(width * stride, seq_len - start))
            parts.append(Part(heads=run.heads, queries=queries, keys=self._summaries(run, 0, strip * width)))
        return parts

    def _own_summaries(self, seq_len: int, role: Role, device: torch.device) -> list[Part]:
        """Summaries of the token's own block, up to the token itself."""
        stride, c = self.stride, self.config.c
        blocks, remainder = divmod(seq_len, stride)
        index = torch.arange(stride, device=device)
        triangle = index[:, None] >= index[None, :c]
        parts = []
        for run in self._runs(role):
            # heads with distinct positions have different numbers of queries after them: one part for each
            groups = [(h, h + 1) for h in range(*run.heads)] if run.step else [run.heads]
            for heads in groups:
                offset = self._offset(role, heads[0])
                queries = StridedTokens(start=offset, groups=blocks, group_step=stride, run=stride - offset)
                keys = StridedTokens(start=offset, groups=blocks, group_step=stride, run=c)
                if blocks:
                    parts.append(
                        Part(heads=heads, queries=queries, keys=keys, mask=triangle[: stride - offset])
                    )
                if remainder > offset:
                    queries = StridedTokens(start=blocks * stride + offset, run=remainder - offset)
                    keys = StridedTokens(start=queries.start, run=min(c, queries.run))
                    mask = triangle[: queries.run, : keys.run]
                    parts.append(Part(heads=heads, queries=queries, keys=keys, mask=mask))
        return parts

    def _blocks_without_summaries(self, seq_len: int, role: Role, device: torch.device) -> list[Part]:
        """Each block reads itself without its summary positions, which `_all_summaries` contains."""
        stride, c = self.stride, self.config.c
        blocks, remainder = divmod(seq_len, stride)
        parts = []
        if blocks and c < stride:
            full = StridedTokens(start=0, groups=blocks, group_step=stride, run=stride)
            index = torch.arange(stride, device=device)
            for run in self._runs(role):
                begins = [self._offset(role, h) for h in range(*run.heads)]
                mask = torch.stack([(index < b) | (index >= b + c) for b in begins])[:, None]
                parts.append(Part(heads=run.heads, queries=full, keys=full, mask=mask))
        if remainder > c:
            queries, keys = (StridedTokens(start=blocks * stride, run=n) for n in (remainder, remainder - c))
            parts.append(Part(heads=(role.first, role.last), queries=queries, keys=keys))
        return parts

    def _all_summaries(self, seq_len: int, role: Role, device: torch.device) -> list[Part]:
        """Bidirectional: every token reads all summaries, in pieces of queries."""
        blocks, remainder = divmod(seq_len, self.stride)
        size = piece_size(seq_len, self.device_type)
        parts = []
        for start in range(0, seq_len, size):
            queries = StridedTokens(start=start, run=min(size, seq_len - start))
            if blocks:
                parts += [
                    Part(heads=run.heads, queries=queries, keys=self._summaries(run, 0, blocks))
                    for run in self._runs(role)
                ]
            if remainder:
                short = min(self.config.c, remainder)
                keys = StridedTokens(start=seq_len - short, run=short)
                parts.append(Part(heads=(role.first, role.last), queries=queries, keys=keys))
        return parts

    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """local: the same block; long_range: a summary position; merged: either of them."""
        short = None if causal else (seq_len - seq_len % self.stride, seq_len)
        local, long_range = SameBlock(self.stride), Summaries(self.config, role, self.stride, short)
        return {"local": local, "long_range": long_range, "merged": local | long_range}[role.factor]

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """In closed form, because counting is slow: bidirectional rules have no period, and heads differ."""
        return sum(
            self._role_pairs(seq_len, role, head, causal=causal)
            for role in self.roles
            for head in range(role.first, role.last)
        )

    def _role_pairs(self, seq_len: int, role: Role, head: int, *, causal: bool) -> int:
        """Pairs within blocks, with summaries of other blocks, and with summaries of the own block."""
        stride, c = self.stride, self.config.c
        blocks, remainder = divmod(seq_len, stride)
        if causal:
            local = (blocks * stride * (stride + 1) + remainder * (remainder + 1)) // 2
            others = c * (stride * blocks * (blocks - 1) // 2 + remainder * blocks)
            after = [
                n - self._offset(role, head) for n in (stride, remainder)
            ]  # queries from the first summary
            triangles = [min(n, c) * (min(n, c) + 1) // 2 + max(0, n - c) * c if n > 0 else 0 for n in after]
            own = blocks * triangles[0] + triangles[1]
        else:
            short = min(c, remainder)
            local = blocks * stride**2 + remainder**2
            own = blocks * stride * c + remainder * short
            others = seq_len * (blocks * c + short) - own
        return {"local": local, "long_range": others + own, "merged": local + others}[role.factor]

    def carried(self, seq_len: int) -> int:
        """In closed form, like `pairs`."""
        return sum(
            self._role_carried(seq_len, role, head)
            for role in self.roles
            for head in range(role.first, role.last)
        )

    def _role_carried(self, seq_len: int, role: Role, head: int) -> int:
        """The tokens of the current block so far, and the summaries of all earlier blocks."""
        blocks, remainder = divmod(seq_len, self.stride)
        summaries = blocks * self.config.c
        if role.factor == "long_range":
            return summaries + min(self.config.c, max(0, remainder - self._offset(role, head)))
        return remainder if role.factor == "local" else summaries + remainder
