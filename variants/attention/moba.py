"""MoBA: a query reads its own block, and the past blocks with the best mean keys (Lu 2025, arXiv:2502.13189).

Shapes: B batch, T tokens, H heads, K heads of keys, D channels of a head, b tokens of a block, n blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    Dims,
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.chosen.block_layout import Plan
from variants.ops.chosen.block_means import BlockMeans, best_blocks, block_means, candidate_pairs, own_pairs
from variants.ops.chosen.routed_blocks import routed_attention
from variants.ops.patterns.part_kernels import missing_fused
from variants.ops.projections import Projections, masked_attention

OVERHEAD = (
    "a query computes the scores of all keys of its own block and of some later block means, and the last "
    "tile of a selected block has empty slots"
)


@dataclass(frozen=True, kw_only=True)
class MoBAConfig(VariantConfig):
    """Knobs of the selection."""

    impl: Literal["auto", "fused", "plain"] = "auto"
    """Implementation of attention. fused: gathered blocks, by torch's CPU attention kernel. plain: the same
    by matrix products, on any device. auto: fused on the CPU, plain elsewhere."""
    block: int = knob(256, least=1, unit="tokens")
    """Tokens of a block."""
    top_k: int = knob(3, least=1, unit="blocks")
    """Blocks that a query reads, its own included, as in the paper; so top_k − 1 past blocks."""


def fused(layer: MoBA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gathered blocks, by torch's CPU attention kernel. Raises ValueError for another device."""
    if reason := missing_fused(layer.device_type):
        raise ValueError(reason)
    return layer.attend(q, k, v, "fused")


def plain(layer: MoBA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gathered blocks, by matrix products."""
    return layer.attend(q, k, v, "plain")


class MoBA(SequenceMixer):
    """Mixture of block attention: softmax(QKᵀ/√D)V over the own block, causally, and k − 1 past blocks.

    Each query of each head selects the past blocks with the largest ⟨q, mean of the block's keys⟩ (§2.2). It
    reads its own block in any case. The means of its own and of later blocks would pass later tokens on, and
    are masked before the selection. A query with fewer past blocks reads all of them. No gradient passes
    through the selection.

    The gate computes a score for each query and past block, so it grows with T²/b; it is cheaper than
    attention while T is below 2·k·b². The paper also alternates MoBA with full attention; use
    `variant=hybrid` for both in one model. If heads share keys, each of them selects by itself.
    """

    Config = MoBAConfig
    config: MoBAConfig
    position_scheme = "rotary"
    no_shared_keys = None
    info = Info(
        paper="Lu et al. 2025, MoBA: Mixture of Block Attention, arXiv:2502.13189",
        family="learned patterns",
        complexity=Complexity(time=2, memory=1, formula="T·k·b + T²/b", source="Lu 2025, §2.2"),
        caps=Caps(causal=True, bidirectional=False),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "fused": Impl(
            run=fused,
            missing=lambda device, dtype, head_dim: missing_fused(device.type),
            flop_overhead_reason=OVERHEAD,
            auto_on=("cpu",),
        ),
        "plain": Impl(run=plain, flop_overhead_reason=OVERHEAD, auto_on=(Impl.OTHER_DEVICES,)),
    }

    def __init__(self, config: MoBAConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)

    def _past(self, seq_len: int) -> int:
        """Past blocks that the last query selects."""
        return min(self.config.top_k - 1, (seq_len - 1) // self.config.block)

    def _select(self, q: Tensor, k: Tensor) -> Tensor:
        """The past blocks (B, H, T, picks) that each query selects; the number of blocks where there is none.
        Queries (B, H, T, D), keys (B, K, T, D)."""
        means = self.projections.spread(block_means(k, self.config.block))
        return best_blocks(q, means, self.config.block, self._past(q.shape[2]), self.device_type)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where not causal."""
        q, k, v = self.projections.split_shared(x, ctx.positions)
        return MixerOut(self.projections.merge(self.run_impl(self, q, k, v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kernel: str) -> Tensor:
        """Queries (B, H, T, D), keys and values (B, K, T, D) → (B, H, T, D)."""
        picks, block = self._select(q, k), self.config.block
        starts = tuple((j + 1) * block for j in range(picks.shape[-1]))
        k, v = (self.projections.spread(t) for t in (k, v))  # heads that share keys select by themselves
        return routed_attention(q, k, v, picks, Plan(block, starts, kernel, self.device_type))

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """The past blocks that each query selects (B, H, T, picks)."""
        q, k, _ = self.projections.split_shared(x, ctx.positions)
        return self._select(q, k)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Masked attention; the mask is that of the own block and of the selected blocks."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        return self.projections.merge(masked_attention(q, k, v, self._allowed(self.choices(x, ctx))))

    def _allowed(self, picks: Tensor, start: int = 0) -> Tensor:
        """(B, H, n, start + n) bool: the keys that the queries from token `start` on read."""
        tokens, block = picks.shape[2], self.config.block
        key = torch.arange(start + tokens, device=picks.device)
        query = key[start:, None]
        own = (key // block == query // block) & (key <= query)
        selected = (picks[..., None, :] == (key // block)[:, None]).any(-1)
        return own | selected & (key // block < query // block)

    def cost(self, work: Workload) -> Cost:
        """Gate: 2·D for each query and past block; no gradient passes through it. Attention: 4·D for each
        query and key of its blocks."""
        seq_len, block = work.seq_len, self.config.block
        past = sum(max(0, seq_len - (j + 1) * block) for j in range(self._past(seq_len)))
        each = work.batch_size * work.inner_dim
        parts = {
            "projections": Projections.flops(work),
            "gate": 2 * each * candidate_pairs(seq_len, block) * bool(past),
            "attention": 4 * each * (own_pairs(seq_len, block) + past * block),
        }
        return Cost(parts, {"gate": 0})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all keys and values, and of the means of complete blocks."""
        means = work.seq_len // self.config.block if self.config.top_k > 1 else 0
        return work.batch_size * work.key_dim * (2 * work.seq_len + means) * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> BlockMeans:
        """All keys and values, and the means of complete blocks."""
        blocks = max_len // self.config.block if self.config.top_k > 1 else 0
        shape = batch_size, self.dims.key_heads, self.dims.head_dim
        device = self.projections.out.weight.device
        return BlockMeans(shape, max_len, blocks, self.config.block, clock=clock, dtype=dtype, device=device)

    def decoding_bytes(self, work: Workload) -> int:
        """The state after the last token."""
        return self.state_bytes(work)

    def step(self, x: Tensor, state: BlockMeans) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence; one token gathers its blocks."""
        begin, tokens = state.clock.position, x.shape[1]
        q, k, v = self.projections.split_next(x, state.clock)
        state.write(k, v)
        if not begin and tokens > 1:
            return self.projections.merge(self.run_impl(self, q, k, v))
        means = self.projections.spread(state.means.to(q.dtype))
        picks = best_blocks(
            q, means, self.config.block, self._past(begin + tokens), self.device_type, start=begin
        )
        if tokens == 1:
            keys, values = (t.to(q.dtype) for t in state.of_blocks(picks[:, :, 0]))
            return self.projections.merge(F.scaled_dot_product_attention(q, keys, values))
        allowed = self._allowed(picks, begin)
        keys, values = (
            self.projections.spread(t[:, :, : begin + tokens].to(q.dtype)) for t in (state.keys, state.values)
        )
        return self.projections.merge(F.scaled_dot_product_attention(q, keys, values, attn_mask=allowed))
