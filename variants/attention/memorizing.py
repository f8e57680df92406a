"""Memorizing Transformer: the nearest keys of earlier segments (Wu 2022, arXiv:2203.08913).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, s tokens of a segment,
M keys of the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.chosen.block_means import own_pairs
from variants.ops.chosen.nearest_keys import Memory, nearest_attention
from variants.ops.chosen.nearest_keys_state import MemorizingState
from variants.ops.features.unit_vectors import unit_vectors
from variants.ops.projections import Projections, rotary, rotary_next


@dataclass(frozen=True, kw_only=True)
class MemorizingConfig(VariantConfig):
    """Knobs of the memory."""

    segment: int = knob(256, least=1, unit="tokens")
    """Tokens of a segment, which attends to itself and searches the memory of earlier segments."""
    memory: int = knob(2048, least=1, unit="tokens")
    """Tokens before the segment whose keys and values are searched. The paper has up to 262,144."""
    nearest: int = knob(32, least=1, unit="keys")
    """Keys of the memory that a query reads: those with the largest scores."""


class Memorizing(SequenceMixer):
    """g·softmax over the k nearest keys of the memory + (1 − g)·softmax within the segment, g = σ(b) by head.

    The memory holds the keys and values of the last M tokens before the segment, detached (§3.1). The search
    is exact; the paper's is approximate at its larger sizes. Queries and keys have unit length (§3.2) and the
    scores have a learnt factor for each head, √D at first. Positions are rotary, and are not applied in the
    memory, as the paper has no position bias there.

    The whole sequence is one call: the memory of a layer consists of its own keys, so all segments are
    computed at once. The result, and with the detached memory each gradient, is that of segment by segment.

    Deviations from the paper: every layer has a memory; use `variant=hybrid` for a memory in one layer, as in
    the paper. The local part has no Transformer-XL cache. A segment without a memory reads 0 there.
    """

    Config = MemorizingConfig
    config: MemorizingConfig
    position_scheme = "rotary"
    no_shared_keys = None
    flop_overhead_reason = (
        "queries compute the scores of all keys of their segment, and of a full memory where it is shorter"
    )
    info = Info(
        paper="Wu et al. 2022, Memorizing Transformers, arXiv:2203.08913",
        family="memory",
        complexity=Complexity(time=1, memory=1, formula="T·(s + M)", source="Wu 2022, §3.1"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: MemorizingConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.mix = nn.Parameter(torch.zeros(dims.heads))
        """b."""
        self.scale = nn.Parameter(torch.full((dims.heads,), dims.head_dim**0.5))

    def _sizes(self) -> Memory:
        config = self.config
        return Memory(config.segment, config.memory, config.nearest, self.device_type)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries of length `scale` (B, H, T, D), keys of length 1 and values (B, K, T, D)."""
        weights = self.projections.qkv.weight.split([self.dims.inner_dim, *[self.dims.key_dim] * 2])
        q, k, v = (F.linear(x, w).unflatten(-1, (-1, self.dims.head_dim)).transpose(1, 2) for w in weights)
        with torch.autocast(x.device.type, enabled=False):
            one = torch.ones_like(k[0, :, :1])
            return unit_vectors(q, self._factors(q)), unit_vectors(k, one), v

    def _factors(self, like: Tensor) -> Tensor:
        """The factor of each head and channel (H, 1, D)."""
        return self.scale.to(like.dtype)[:, None, None].expand(-1, 1, self.dims.head_dim)

    # --- forward --------------------------------------------------------------------------------------

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where not causal."""
        q, k, v = self._split(x)
        base = self.dims.rotary_base
        q_turned, k_turned = (rotary(t.transpose(1, 2), ctx.positions, base).transpose(1, 2) for t in (q, k))
        found = nearest_attention(q, k, v, self._sizes())
        return MixerOut(self.projections.merge(self._mixed(self._local(q_turned, k_turned, v), found)))

    def _local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within segments: (B, H, T, D)."""
        k, v = self.projections.spread(k), self.projections.spread(v)
        size, full = self.config.segment, q.shape[2] // self.config.segment
        outputs = []
        if full:
            folded = (t[:, :, : full * size].unflatten(2, (full, size)).transpose(1, 2) for t in (q, k, v))
            q_full, k_full, v_full = (t.flatten(0, 1) for t in folded)
            y = F.scaled_dot_product_attention(q_full, k_full, v_full, is_causal=True, scale=1.0)
            outputs.append(y.unflatten(0, (len(q), full)).transpose(1, 2).flatten(2, 3))
        if full * size < q.shape[2]:
            q, k, v = (t[:, :, full * size :] for t in (q, k, v))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _mixed(self, local: Tensor, found: Tensor) -> Tensor:
        gate = self.mix.sigmoid().to(local.dtype)[:, None, None]
        return torch.lerp(local, found.to(local.dtype), gate)

    def choices(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, H, T, T) bool: the keys of the memory that each query reads."""
        q, k, _ = self._split(x)
        token = torch.arange(x.shape[1], device=x.device)
        begin = (token // self.config.segment * self.config.segment)[:, None]
        there = (token < begin) & (token >= begin - self.config.memory)
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = q.to(wide) @ self.projections.spread(k).to(wide).mT
        scores = scores.masked_fill(~there, float("-inf"))
        best = scores.topk(min(self.config.nearest, x.shape[1]), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & there

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Two masked attentions; keys and values of the memory are detached."""
        self.require_objective(causal=ctx.causal)
        heads = [
            F.linear(x, w)
            for w in self.projections.qkv.weight.split([self.dims.inner_dim, *[self.dims.key_dim] * 2])
        ]
        q, k, v = (t.unflatten(-1, (-1, self.dims.head_dim)) for t in heads)
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        turned = [rotary(t, ctx.positions, self.dims.rotary_base).transpose(1, 2) for t in (q, k)]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        spread, factor = self.projections.spread, self.scale[:, None, None]
        k, v, turned[1] = spread(k), spread(v), spread(turned[1])
        token = torch.arange(x.shape[1], device=x.device)
        own = (token <= token[:, None]) & (
            token // self.config.segment == token[:, None] // self.config.segment
        )
        scores = factor * (turned[0] @ turned[1].mT)
        local = scores.masked_fill(~own, float("-inf")).softmax(-1) @ v
        read = self.choices(x, ctx)
        scores = factor * (q @ k.detach().mT)
        weights = scores.masked_fill(~read, float("-inf")).softmax(-1)
        found = torch.where(read, weights, 0.0) @ v.detach()  # 0 without a memory
        return self.projections.merge(self._mixed(local, found))

    # --- cost -----------------------------------------------------------------------------------------

    def cost(self, work: Workload) -> Cost:
        """Attention within segments, and to the nearest keys; 2·D for each score of the search, through which
        no gradient passes. The scores of the nearest keys are among those."""
        each = work.batch_size * work.inner_dim
        searched, read = self._sizes().pairs(work.seq_len)
        parts = {
            "projections": Projections.flops(work),
            "attention": 4 * each * own_pairs(work.seq_len, self.config.segment),
            "search": 2 * each * searched,
            "reading": 2 * each * read,
        }
        return Cost(parts, {"search": 0})

    def _rows(self, seq_len: int) -> tuple[int, int]:
        """Tokens of the memory and of the open segment."""
        open_tokens = seq_len % self.config.segment
        return min(seq_len - open_tokens, self.config.memory), open_tokens

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of the memory and of the open segment, and of its rotated keys."""
        memory, open_tokens = self._rows(work.seq_len)
        rows = 2 * memory + 3 * open_tokens
        return work.batch_size * work.key_dim * rows * work.element_bytes

    # --- decoding -------------------------------------------------------------------------------------

    def init_state(
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> MemorizingState:
        """Keys and values of the memory and of a segment."""
        shape = batch_size, self.dims.key_heads, self.dims.head_dim
        device = self.projections.out.weight.device
        config = self.config
        return MemorizingState(clock, max_len, shape, (config.segment, config.memory), dtype, device)

    def decoding_bytes(self, work: Workload) -> int:
        """A full memory and a whole segment."""
        segment = min(work.seq_len, self.config.segment)
        rows = 2 * min(work.seq_len, self.config.segment + self.config.memory) + segment
        return work.batch_size * work.key_dim * rows * work.element_bytes

    def step(self, x: Tensor, state: MemorizingState) -> Tensor:
        """(B, n, C) → (B, n, C), segment by segment."""
        q, k, v = self._split(x)
        turned = [
            rotary_next(t.transpose(1, 2), state.clock, self.dims.rotary_base).transpose(1, 2) for t in (q, k)
        ]
        outputs, begin = [], 0
        while begin < x.shape[1]:
            end = min(x.shape[1], begin + self.config.segment - state.segment)
            q_part, k_part, *parts, v_part = (t[:, :, begin:end] for t in (q, k, *turned, v))
            outputs.append(self._step((q_part, parts[0]), (k_part, parts[1]), v_part, state))
            begin = end
        return self.projections.merge(torch.cat(outputs, dim=2))

    def _step(
        self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], v: Tensor, state: MemorizingState
    ) -> Tensor:
        """Tokens of one segment, with queries and keys without and with positions: (B, H, n, D)."""
        (q, q_turned), (k, k_turned) = queries, keys
        spread, first = self.projections.spread, state.segment
        memory = [spread(t.to(q.dtype)) for t in state.memory()]
        own, values = (spread(t.to(q.dtype)) for t in state.append(k, v, k_turned))
        key = torch.arange(own.shape[2], device=q.device)
        allowed = key <= key[first:, None]
        local = F.scaled_dot_product_attention(q_turned, own, values, attn_mask=allowed, scale=1.0)
        found = torch.zeros_like(q)
        if count := min(self.config.nearest, memory[0].shape[2]):
            best = (q @ memory[0].mT).topk(count, dim=-1)
            places = best.indices[..., None].expand(-1, -1, -1, -1, q.shape[-1])
            rows = memory[1][:, :, None].expand(-1, -1, q.shape[2], -1, -1).gather(3, places)
            found = (best.values.softmax(-1)[..., None] * rows).sum(3)
        if state.segment == self.config.segment:
            state.end_segment()
        return self._mixed(local, found)
