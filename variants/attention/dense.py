"""Dense attention: a token reads all tokens that the objective allows (Vaswani 2017, arXiv:1706.03762, §3.2).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from variants.base import Caps, Complexity, Context, Impl, Info, VariantConfig
from variants.ops.fused import backends
from variants.ops.fused.forced_sdpa import forced
from variants.ops.patterns import masks
from variants.ops.patterns.masked_attention import FLEX, MaskedAttention
from variants.ops.patterns.masks import Rule
from variants.ops.projections import masked_attention


@dataclass(frozen=True, kw_only=True)
class DenseConfig(VariantConfig):
    """Knobs of dense attention."""

    impl: Literal["sdpa", "naive", "flash", "cudnn", "efficient", "math", "flex", "xformers"] = "sdpa"
    """Implementation of attention. sdpa: torch's fused kernel, which stores no T × T matrix, by the backend
    that torch chooses. naive: scores, softmax and weighted sum as separate operations. flash, cudnn,
    efficient, math: torch's function by this backend only; math stores the matrix. flex: FlexAttention,
    compiled. xformers: its memory_efficient_attention. cudnn, efficient, flex and xformers need CUDA."""


def sdpa(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """torch's fused kernel."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def naive(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Scores, softmax and weighted sum as separate operations."""
    return masked_attention(q, k, v, masks.matrix(layer.mask(q.shape[2], causal=causal), q.shape[2]))


def xformers(layer: MaskedAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """xformers' memory_efficient_attention."""
    return backends.xformers(q, k, v, causal=causal)


class Dense(MaskedAttention):
    """softmax(QKᵀ/√D)V with rotary positions.

    Deviations from the paper: rotary positions instead of sinusoidal embeddings; no biases.
    """

    Config = DenseConfig
    config: DenseConfig
    info = Info(
        paper="Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="Vaswani 2017, Table 1"),
        caps=Caps(causal=True, bidirectional=True, exact=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "sdpa": Impl(run=sdpa, selects=("flash", "cudnn", "efficient", "math")),
        "naive": Impl(
            run=naive, flop_overhead_reason="naive computes all scores and masks the forbidden half"
        ),
        **{name: forced(name) for name in ("flash", "cudnn", "efficient")},
        "math": forced("math", flop_overhead_reason="math computes all scores and masks the forbidden half"),
        "flex": FLEX,
        "xformers": Impl(
            run=xformers,
            missing=lambda device, dtype, head_dim: backends.missing_xformers(device, head_dim, dtype),
        ),
    }

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """All keys."""
        return masks.all_keys

    def queries_keys(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, T, D) of the projections."""
        q, k = self.projections.queries_keys(x, ctx.positions)
        return q, self.projections.spread(k)
