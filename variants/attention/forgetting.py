"""Forgetting attention: a forget gate in softmax attention (Lin 2025, FoX, arXiv:2503.02130).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

import math
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
    DecodingState,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.ops.projections import Projections
from variants.ops.row_blocks import row_block_attention


@dataclass(frozen=True, kw_only=True)
class ForgettingConfig(VariantConfig):
    """Knobs of forgetting attention: none."""


class Forgetting(SequenceMixer):
    """softmax(QKᵀ/√D + Σ log f) V: the scores of a query i and a key j are lowered by the forget gates of the
    tokens j + 1 … i. f = σ(w·x + β) is a number for each token and head.

    With b, the sum of log f over all tokens so far, the term is b_i − b_j. b has float64 numbers, since it
    can be large while differences of near tokens matter (see `variants.ops.row_blocks`).

    There are no rotary positions: gates order the tokens, and the paper does without by default. This is the
    paper's layer in a LLaMA block. Its "Pro" block adds an output gate, norms of queries and keys and shifts
    of keys and values, which are no part of the mechanism. A bidirectional form would need a second direction
    of gates, and the paper has none.
    """

    Config = ForgettingConfig
    config: ForgettingConfig
    position_scheme = "relative"
    flop_overhead_reason = "a block of queries computes the scores that any of its queries needs"
    info = Info(
        paper="Lin et al. 2025, Forgetting Transformer, arXiv:2503.02130",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="as dense attention"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: ForgettingConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.gate = nn.Linear(dims.d_model, dims.heads)
        nn.init.zeros_(self.gate.bias)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) → queries, keys and values (B, H, T, D)."""
        q, k, v = (
            F.linear(x, weight).unflatten(-1, (self.dims.heads, -1)).transpose(1, 2)
            for weight in self.projections.qkv.weight.chunk(3)
        )
        return q, k, v

    def _log_gates(self, x: Tensor) -> Tensor:
        """log f (B, H, T), float64."""
        return F.logsigmoid(self.gate(x).double()).transpose(1, 2)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        return MixerOut(self._attend(*self._split(x), self._log_gates(x).cumsum(-1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
        """Whole sequences: (B, H, T, D) and b (B, H, T) → (B, T, C)."""
        y = row_block_attention(
            q[:, :, None], k[:, :, None], v, decay=decay, causal=True, device_type=self.device_type
        )
        return self.projections.merge(y.to(v.dtype))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """All scores, with the sums of log f between each query and key."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self._split(x)
        until = -torch.log1p(torch.exp(-self.gate(x).double())).cumsum(1).transpose(1, 2)
        between = until[..., :, None] - until[..., None, :]
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores + between.to(torch.promote_types(q.dtype, torch.float32))
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return self.projections.merge(weights.to(v.dtype) @ v)

    def cost(self, work: Workload) -> Cost:
        """Dense attention of causal pairs. The product that gives the gates belongs to the positions."""
        tokens = work.batch_size * work.seq_len
        gates = 2 * tokens * work.d_model * work.heads
        attention = 2 * tokens * (work.seq_len + 1) * work.inner_dim
        projections = Projections.flops(work)
        return Cost({"projections": projections, "positions": gates, "attention": attention})

    # --- decoding -------------------------------------------------------------------------------------

    def state_bytes(self, work: Workload) -> int:
        """Bytes of keys and values, and of b in float64."""
        keys = 2 * work.inner_dim * work.element_bytes
        return work.batch_size * work.seq_len * (keys + 8 * work.heads)

    def decoding_bytes(self, work: Workload) -> int:
        """Those of all tokens."""
        return self.state_bytes(work)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> GatedCache:
        """The keys, values and sums of all tokens."""
        shape = batch_size, self.dims.heads, max_len, self.dims.head_dim
        return GatedCache(clock, max_len, shape, dtype, self.gate.weight.device)

    def step(self, x: Tensor, state: GatedCache) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self._split(x)
        begin, tokens = state.clock.position, x.shape[1]
        end = begin + tokens
        decay = self._log_gates(x).cumsum(-1)
        if begin:
            decay = decay + state.decay[:, :, begin - 1 : begin]
        for kept, new in ((state.keys, k), (state.values, v), (state.decay, decay)):
            kept[:, :, begin:end] = new
        if not begin and tokens > 1:
            return self._attend(q, k, v, decay)
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q @ state.keys[:, :, :end].to(q.dtype).mT).to(wide) * q.shape[-1] ** -0.5
        scores = scores + (decay[..., None] - state.decay[:, :, None, :end]).to(wide)
        if tokens > 1:
            index = torch.arange(end, device=x.device)
            scores = scores.masked_fill(index > index[begin:, None], float("-inf"))
        y = scores.softmax(-1).to(q.dtype) @ state.values[:, :, :end].to(q.dtype)
        return self.projections.merge(y)


class GatedCache(DecodingState):
    """Keys and values (B, H, T, D) of all tokens, and their sums of log f (B, H, T), float64."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.decay = torch.zeros(shape[:3], dtype=torch.float64, device=device)
