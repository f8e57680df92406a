"""Sparse Transformer, fixed pattern (Child 2019, arXiv:1904.10509, §4.3).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride, c summary positions a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from variants.knobs import knob
from variants.ops.factorised import Role, SparseAttention, SparseConfig
from variants.ops.masks import Rule, SameBlock
from variants.ops.strided_parts import Cut, Part, piece_size
from variants.ops.tile_size import Sizes

Index = TypeVar("Index", int, Tensor)
STRIPS = Sizes(cpu=32, accelerator=8)
"""Strips of queries that share a rectangle of earlier summaries: of n, on average 1/n more pairs than
allowed."""


@dataclass(frozen=True, kw_only=True)
class SparseFixedConfig(SparseConfig):
    """Knobs of the fixed pattern. A stride of null is at least c."""

    c: int = knob(8, least=1, unit="positions")
    """Summary positions in each block of `stride` tokens. The paper takes 8, 16 or 32, and 32 for text
    (§4.3, §7.2). Cost grows with it: at 16,384 tokens and l = 128 a quarter of dense attention's pairs
    are left with 32, a fourteenth with 8."""
    subblocks: Literal["distinct", "shared"] = "distinct"
    """Whether heads have summary positions of their own. distinct: each head has c positions of its own,
    which the paper prefers: the last head the end of a block, the one before it the c tokens before, … and
    again from the end where a block is used up. shared: all heads have the last c."""

    def __post_init__(self) -> None:
        self.require("c", self.stride is None or self.c <= self.stride, f"at most stride={self.stride}")

    def stride_for(self, seq_len: int) -> int:
        """The stride of a layer built for sequences up to seq_len."""
        return max(self.c, super().stride_for(seq_len))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Heads [first, last), whose summary positions begin at `offset`, `offset` + step, … in a block."""

    first: int
    last: int
    offset: int
    step: int

    @property
    def heads(self) -> tuple[int, int]:
        return self.first, self.last


def _offset(config: SparseFixedConfig, role: Role, head: Index, stride: int) -> Index:
    """Where the summary positions of a head, or of several, begin in a block."""
    if config.subblocks == "shared":
        return head * 0 + (stride - config.c)
    from_last = (role.last - 1 - head) % (stride // config.c)
    return stride - config.c * (1 + from_last)


@dataclass(frozen=True)
class Summaries(Rule):
    """Keys at the summary positions of a head, in any block."""

    config: SparseFixedConfig
    role: Role
    stride: int
    short_block: tuple[int, int] | None
    """Where a block that is cut short begins and ends, if its own last c tokens summarise it."""

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Whatever the query."""
        if self.config.subblocks == "shared":  # no head is asked for
            offset: Tensor | int = self.stride - self.config.c
        else:
            offset = _offset(self.config, self.role, head, self.stride)
        in_block = j % self.stride
        regular = (in_block >= offset) & (in_block < offset + self.config.c)
        if self.short_block is None:
            return regular & (i == i)  # to the shape of i
        begin, end = self.short_block
        return ((regular & (j < begin)) | ((j >= begin) & (j >= end - self.config.c))) & (i == i)


class SparseFixed(SparseAttention):
    """A token's own block of l tokens (near), and c summary positions of every block (far).

    The far factor alone gives a token with no summary at or before it nothing to read: its output is
    0, and the residual stream passes it on. Bidirectionally, which the paper does not have, both
    factors extend to later tokens, and the last block, where it is cut short, is summarised by its own
    last c tokens for every head: else no other block could ever read it.
    """

    Config = SparseFixedConfig
    config: SparseFixedConfig
    flop_overhead_reason = (
        "a strip of queries is given all summaries of its blocks, or a block all of its keys, some masked"
    )

    def _runs(self, role: Role) -> list[_Run]:
        """The role's heads, by where their summaries are."""
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
        """Where a head's summary positions begin in a block."""
        return _offset(self.config, role, head, self.stride)

    def _summaries(self, run: _Run, first: int, count: int) -> Cut:
        """The summary positions of `count` blocks from `first`, as one set of keys."""
        stride = self.stride
        start = first * stride + run.offset
        return Cut(start=start, rows=count, row_step=stride, run=self.config.c, head_step=run.step)

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """Those of each role, laid out by hand: tiles of the rule would hold summaries one by one."""
        return [
            part
            for role in self.roles
            for part in self._role_parts(seq_len, role, causal=causal, device=device)
        ]

    def _role_parts(self, seq_len: int, role: Role, *, causal: bool, device: torch.device) -> list[Part]:
        """Own blocks, then summaries; what both hold is left to the cheaper place."""
        if role.factor == "near":
            return self._blocks(seq_len, role.first, role.last, causal)
        if causal:
            earlier = [p for run in self._runs(role) for p in self._earlier(seq_len, run, device)]
            if role.factor == "merged":
                return self._blocks(seq_len, role.first, role.last, causal) + earlier
            return earlier + self._own_summaries(seq_len, role, device)
        parts = self._blocks_unsummarised(seq_len, role, device) if role.factor == "merged" else []
        return parts + self._all_summaries(seq_len, role, device)

    def _blocks(self, seq_len: int, first: int, last: int, causal: bool) -> list[Part]:
        """Every block by itself."""
        stride, heads = self.stride, (first, last)
        blocks, rest = divmod(seq_len, stride)
        full = Cut(start=0, groups=blocks, group_step=stride, run=stride)
        short = Cut(start=blocks * stride, run=rest)
        parts = [Part(heads=heads, queries=full, keys=full, causal=causal)] if blocks else []
        return parts + ([Part(heads=heads, queries=short, keys=short, causal=causal)] if rest else [])

    def _earlier(self, seq_len: int, run: _Run, device: torch.device) -> list[Part]:
        """Summaries of earlier blocks: the strips' staircases, then the rectangles before them."""
        stride, c = self.stride, self.config.c
        blocks, rest = divmod(seq_len, stride)
        count = blocks if rest else blocks - 1  # query block n + 1 reads key blocks 0 … n, n < count
        if count < 1:
            return []
        width = -(-count // STRIPS.on(self.device_type))  # blocks in a strip
        full, left = divmod(count, width)
        if rest and not left:  # the last strip ends in a cut-off block
            full, left = full - 1, width
        index = torch.arange(width, device=device)
        stairs = index[:, None] >= index[None, :]
        mask = stairs.repeat_interleave(stride, 0).repeat_interleave(c, 1) if width > 1 else None
        parts = []
        if full:
            queries = Cut(start=stride, groups=full, group_step=width * stride, run=width * stride)
            keys = self._summaries(run, 0, width)
            keys = Cut(**{**keys.__dict__, "groups": full, "group_step": width * stride})
            parts.append(Part(heads=run.heads, queries=queries, keys=keys, mask=mask))
        start = (full * width + 1) * stride
        if left:
            queries = Cut(start=start, run=seq_len - start)
            keys = self._summaries(run, full * width, left)
            cut_mask = None if mask is None else mask[: queries.run, : keys.length]
            parts.append(Part(heads=run.heads, queries=queries, keys=keys, mask=cut_mask))
        for strip in range(1, full + bool(left)):
            start = (strip * width + 1) * stride
            queries = Cut(start=start, run=min(width * stride, seq_len - start))
            parts.append(Part(heads=run.heads, queries=queries, keys=self._summaries(run, 0, strip * width)))
        return parts

    def _own_summaries(self, seq_len: int, role: Role, device: torch.device) -> list[Part]:
        """Summaries of a token's own block up to itself."""
        stride, c = self.stride, self.config.c
        blocks, rest = divmod(seq_len, stride)
        index = torch.arange(stride, device=device)
        upto = index[:, None] >= index[None, :c]
        parts = []
        for run in self._runs(role):
            # heads with positions of their own have as many queries after them: one part each
            groups = [(h, h + 1) for h in range(*run.heads)] if run.step else [run.heads]
            for heads in groups:
                offset = self._offset(role, heads[0])
                queries = Cut(start=offset, groups=blocks, group_step=stride, run=stride - offset)
                keys = Cut(start=offset, groups=blocks, group_step=stride, run=c)
                if blocks:
                    parts.append(Part(heads=heads, queries=queries, keys=keys, mask=upto[: stride - offset]))
                if rest > offset:
                    queries = Cut(start=blocks * stride + offset, run=rest - offset)
                    keys = Cut(start=queries.start, run=min(c, queries.run))
                    mask = upto[: queries.run, : keys.run]
                    parts.append(Part(heads=heads, queries=queries, keys=keys, mask=mask))
        return parts

    def _blocks_unsummarised(self, seq_len: int, role: Role, device: torch.device) -> list[Part]:
        """Every block by itself without its summary positions, which all tokens read."""
        stride, c = self.stride, self.config.c
        blocks, rest = divmod(seq_len, stride)
        parts = []
        if blocks and c < stride:
            full = Cut(start=0, groups=blocks, group_step=stride, run=stride)
            index = torch.arange(stride, device=device)
            for run in self._runs(role):
                begins = [self._offset(role, h) for h in range(*run.heads)]
                mask = torch.stack([(index < b) | (index >= b + c) for b in begins])[:, None]
                parts.append(Part(heads=run.heads, queries=full, keys=full, mask=mask))
        if rest > c:
            queries, keys = (Cut(start=blocks * stride, run=n) for n in (rest, rest - c))
            parts.append(Part(heads=(role.first, role.last), queries=queries, keys=keys))
        return parts

    def _all_summaries(self, seq_len: int, role: Role, device: torch.device) -> list[Part]:
        """Bidirectionally, every summary for every token, a strip of queries at a time."""
        blocks, rest = divmod(seq_len, self.stride)
        size = piece_size(seq_len, self.device_type)
        parts = []
        for start in range(0, seq_len, size):
            queries = Cut(start=start, run=min(size, seq_len - start))
            if blocks:
                parts += [
                    Part(heads=run.heads, queries=queries, keys=self._summaries(run, 0, blocks))
                    for run in self._runs(role)
                ]
            if rest:
                short = min(self.config.c, rest)
                keys = Cut(start=seq_len - short, run=short)
                parts.append(Part(heads=(role.first, role.last), queries=queries, keys=keys))
        return parts

    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """The same block, a summary position, or either."""
        short = None if causal else (seq_len - seq_len % self.stride, seq_len)
        near, far = SameBlock(self.stride), Summaries(self.config, role, self.stride, short)
        return {"near": near, "far": far, "merged": near | far}[role.factor]

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """In closed form: the rule has no period bidirectionally, and each head its own offset."""
        return sum(
            self._role_pairs(seq_len, role, head, causal=causal)
            for role in self.roles
            for head in range(role.first, role.last)
        )

    def _role_pairs(self, seq_len: int, role: Role, head: int, *, causal: bool) -> int:
        """Blocks, summaries of other blocks, summaries of one's own."""
        stride, c = self.stride, self.config.c
        blocks, rest = divmod(seq_len, stride)
        if causal:
            near = (blocks * stride * (stride + 1) + rest * (rest + 1)) // 2
            others = c * (stride * blocks * (blocks - 1) // 2 + rest * blocks)
            after = [n - self._offset(role, head) for n in (stride, rest)]  # queries from the first summary
            triangles = [min(n, c) * (min(n, c) + 1) // 2 + max(0, n - c) * c if n > 0 else 0 for n in after]
            own = blocks * triangles[0] + triangles[1]
        else:
            short = min(c, rest)
            near = blocks * stride**2 + rest**2
            own = blocks * stride * c + rest * short
            others = seq_len * (blocks * c + short) - own
        return {"near": near, "far": others + own, "merged": near + others}[role.factor]

    def carried(self, seq_len: int) -> int:
        """In closed form, like `pairs`."""
        return sum(
            self._role_carried(seq_len, role, head)
            for role in self.roles
            for head in range(role.first, role.last)
        )

    def _role_carried(self, seq_len: int, role: Role, head: int) -> int:
        """What the current block has so far, and the summaries of the blocks before it."""
        blocks, rest = divmod(seq_len, self.stride)
        summaries = blocks * self.config.c
        if role.factor == "far":
            return summaries + min(self.config.c, max(0, rest - self._offset(role, head)))
        return rest if role.factor == "near" else summaries + rest
