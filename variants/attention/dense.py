"""Dense attention: every token reads every token it may (Vaswani 2017, arXiv:1706.03762, §3.2).

Shapes: B batch, T tokens, C channels, H heads, D = C / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import (
    Caps,
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
from variants.ops import backends, masks
from variants.ops.projections import Projections, masked_attention


@dataclass(frozen=True, kw_only=True)
class DenseConfig(VariantConfig):
    """Knobs of dense attention."""

    impl: Literal["sdpa", "naive", "flex", "xformers"] = "sdpa"
    """Implementation of attention. sdpa: torch's fused kernel, which stores no T × T matrix. naive: scores,
    softmax and sum in turn. flex: FlexAttention, compiled. xformers: its memory_efficient_attention. The last
    two need CUDA."""


class Dense(SequenceMixer):
    """softmax(QKᵀ/√D)V with rotary positions.

    Deviations from the paper: rotary instead of added sinusoidal positions, no biases.
    """

    Config = DenseConfig
    config: DenseConfig
    info = Info(
        paper="Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="Vaswani 2017, Table 1"),
        caps=Caps(causal=True, bidirectional=True, exact=True),
    )

    def __init__(self, config: DenseConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        if config.impl == "naive":
            self.flop_overhead_reason = "naive computes every score and masks the forbidden half"
        elif config.impl == "flex":
            self.flop_overhead_reason, self.overhead_is_bounded = backends.FLEX_PADDING, False

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """The kernels that torch does not have everywhere."""
        assert isinstance(config, DenseConfig)
        if config.impl == "flex":
            return backends.missing_flex(device, dims.head_dim)
        if config.impl == "xformers":
            return backends.missing_xformers(device, dims.head_dim, dtype)
        return None

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        return MixerOut(self.projections.merge(self._attend(q, k, v, ctx.causal)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """(B, H, T, D) → (B, H, T, D) by the kernel that `impl` names."""
        if self.config.impl == "naive":
            return masked_attention(q, k, v, self._allowed(q.shape[2], causal))
        if self.config.impl == "flex":
            return backends.flex(q, k, v, backends.Alike(self._rule(causal)), alike=True)
        if self.config.impl == "xformers":
            return backends.xformers(q, k, v, causal=causal)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    @staticmethod
    def _rule(causal: bool) -> masks.Rule:
        return masks.causal if causal else masks.anything

    def _allowed(self, seq_len: int, causal: bool) -> Tensor:
        return masks.matrix(self._rule(causal), seq_len)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The oracle on the variant's pattern, plan included."""
        q, k, v = self.projections.split(x, ctx.positions)
        return self.projections.merge(
            masked_attention(q, k, v, self.attention_mask(x.shape[1], causal=ctx.causal))
        )

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Those of the projections."""
        q, k, _ = self.projections.split(x, ctx.positions)
        return q, k

    def cost(self, work: Workload) -> Cost:
        """Scores and weighted sum: 4·C for each of the T(T+1)/2 or T² pairs."""
        t = work.seq_len
        pairs = t * (t + 1) // 2 if work.causal else t * t
        return Cost(
            {
                "projections": Projections.flops(work.batch_size, t, work.d_model),
                "attention": 4 * work.batch_size * work.d_model * pairs,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """The keys and values of every token."""
        return 2 * work.batch_size * work.seq_len * work.d_model * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """Everything, or everything up to the query."""
        return self._allowed(seq_len, causal)
