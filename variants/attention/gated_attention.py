"""Gated attention: a sigmoid gate on the outputs of softmax attention (Qiu 2025, arXiv:2505.06708).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Complexity, Context, Cost, Dims, Info, MixerOut, VariantConfig, Workload
from variants.ops.key_cache import KeyCache
from variants.ops.patterns import masks
from variants.ops.patterns.masked_attention import MaskedAttention
from variants.ops.patterns.masks import Rule
from variants.ops.projections import masked_attention


@dataclass(frozen=True, kw_only=True)
class GatedAttentionConfig(VariantConfig):
    """Knobs of the gate."""

    gate: Literal["element", "head"] = "element"
    """Numbers of the gate of a token. element: one for each channel of each head, C² more parameters. head:
    one for each head, C·H more parameters."""


class GatedAttention(MaskedAttention):
    """W_o (σ(W_g x) ⊙ attention(x)): dense softmax attention by torch's fused kernel, and a gate by token.

    x is the normalised input of the layer, from which queries, keys and values are computed too. The gate
    stands between the two linear maps of the values and of the output, which would otherwise be one map of
    low rank, and lets a head write nothing, so that no token has to be a sink.

    With gate=element the layer has C² parameters more than dense attention, a quarter of its own. The paper
    counts them in comparisons; here no other part of a model is made smaller, so its size is reported beside
    its quality.

    Deviations: only the gate that the paper prefers, with a sigmoid, multiplicative, after the weighted sum,
    with separate weights for each head. Positions are rotary, as in every variant of this project.
    """

    Config = GatedAttentionConfig
    config: GatedAttentionConfig
    info = Info(
        paper="Qiu et al. 2025, Gated Attention for Large Language Models, arXiv:2505.06708",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="as dense attention"),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: GatedAttentionConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.gate = nn.Linear(dims.d_model, self._gates(dims), bias=False)

    def _gates(self, dims: Dims) -> int:
        """Numbers of the gate of a token."""
        return dims.inner_dim if self.config.gate == "element" else dims.heads

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """All keys."""
        return masks.all_keys

    def _merge(self, y: Tensor, x: Tensor) -> Tensor:
        """Outputs of attention (B, H, T, D) and inputs of the layer (B, T, C) → (B, T, C)."""
        gate = self.gate(x).sigmoid().unflatten(-1, (self.dims.heads, -1))  # (B, T, H, D or 1)
        merged: Tensor = self.projections.out((y.transpose(1, 2) * gate).flatten(2))
        return merged

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        return MixerOut(self._merge(F.scaled_dot_product_attention(q, k, v, is_causal=ctx.causal), x))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The gate of each head, from its own rows of the weights."""
        q, k, v = self.projections.split(x, ctx.positions)
        y = masked_attention(q, k, v, self.allowed(x.shape[1], causal=ctx.causal))
        heads = self.gate.weight.chunk(self.dims.heads)
        gated = [y[:, head] / (1 + torch.exp(-(x @ rows.T))) for head, rows in enumerate(heads)]
        return torch.cat(gated, dim=-1) @ self.projections.out.weight.T

    def cost(self, work: Workload) -> Cost:
        """The cost of dense attention, and the projection to the gate."""
        gate = 2 * work.batch_size * work.seq_len * work.d_model * self._gates(work)
        return super().cost(work) + Cost({"projections": gate})

    def step(self, x: Tensor, state: KeyCache) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        if state.clock.position or x.shape[1] == 1:
            return self._merge(state.attend(q, k, v), x)
        state.write(k, v)
        k, v = self.projections.spread(k), self.projections.spread(v)
        return self._merge(F.scaled_dot_product_attention(q, k, v, is_causal=True), x)
