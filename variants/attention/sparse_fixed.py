"""Sparse Transformer, fixed pattern (Child 2019, arXiv:1904.10509, §4.3).

Shapes: B batch, T tokens, C channels, H heads, D their channels; l the stride, c summary positions a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from variants.knobs import knob
from variants.ops.fused.flash_union import Union
from variants.ops.patterns import summary_parts
from variants.ops.patterns.factorised import Role, SparseAttention, SparseConfig
from variants.ops.patterns.masks import Rule, SameBlock
from variants.ops.patterns.strided_parts import Part
from variants.ops.patterns.summaries import Positions, Summaries
from variants.ops.patterns.summary_calls import summary_union


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

    def positions(self, role: Role) -> Positions:
        """The summary positions of the heads of a role."""
        return Positions(
            stride=self.stride,
            c=self.config.c,
            first=role.first,
            last=role.last,
            shared=self.config.subblocks == "shared",
        )

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """The parts of each role; not from tiles of the rule, which would contain few summary positions."""
        return [
            part
            for role in self.roles
            for part in self._role_parts(seq_len, role, causal=causal, device=device)
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], kernel: str) -> Tensor:
        """With the keys that the parts for an accelerator read after the sequence."""
        positions = self.positions(self.roles[-1])  # of the long-range factor, if there is one
        if self.device_type != "cpu" and any(part.keys.start >= q.shape[2] for part in parts):
            k, v = positions.append_to(k, v)
        return super().attend(q, k, v, parts, kernel)

    def _role_parts(self, seq_len: int, role: Role, *, causal: bool, device: torch.device) -> list[Part]:
        """Blocks, then summaries. Pairs that belong to both are computed where it is cheaper."""
        positions = self.positions(role)
        if role.factor == "local":
            return summary_parts.blocks_of(seq_len, positions, causal)
        if causal:
            earlier = summary_parts.earlier_blocks(seq_len, positions, device, self.device_type)
            if role.factor == "merged":
                return summary_parts.blocks_of(seq_len, positions, causal) + earlier
            return earlier + summary_parts.own_summaries(seq_len, positions, device)
        local = role.factor == "merged"
        parts = summary_parts.blocks_without_summaries(seq_len, positions, device) if local else []
        return parts + summary_parts.all_summaries(seq_len, positions, self.device_type)

    def role_union(self, q: Tensor, role: Role, *, causal: bool) -> Union:
        """The own block with summaries of near blocks, and summaries of far blocks."""
        return summary_union(q, q.shape[2], self.positions(role), role.factor, causal)

    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """local: the same block; long_range: a summary position; merged: either of them."""
        short = None if causal else (seq_len - seq_len % self.stride, seq_len)
        local, long_range = SameBlock(self.stride), Summaries(self.positions(role), short)
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
                n - self.positions(role).offset(head) for n in (stride, remainder)
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
        """In closed form, like `pairs`, unless heads share keys."""
        if self.dims.queries_per_key > 1:
            return super().carried(seq_len)
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
            return summaries + min(self.config.c, max(0, remainder - self.positions(role).offset(head)))
        return remainder if role.factor == "local" else summaries + remainder
