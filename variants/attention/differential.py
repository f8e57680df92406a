"""Differential attention: the difference of two softmax maps (Ye 2024, arXiv:2410.05258, §2.1).

Shapes: B batch, T tokens, C channels, H heads of queries, P = H/2 pairs, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.ops.patterns import masks
from variants.ops.projections import Projections
from variants.ops.row_blocks import row_block_attention

EPSILON = 1e-5
"""Added to the mean square of the outputs of a pair, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class DifferentialConfig(VariantConfig):
    """Knobs of the difference."""

    impl: Literal["auto", "rows", "sdpa"] = "auto"
    """Implementation of the maps. rows: matrix products, a few queries with all keys at a time, on any
    device. sdpa: torch's fused kernel, which computes each score twice, for the two halves of the values.
    auto: rows on the CPU, sdpa elsewhere."""


def rows(layer: Differential, q: Tensor, k: Tensor, v: Tensor, factor: Tensor, causal: bool) -> Tensor:
    """Both maps of a block of queries, whose difference is multiplied by the values."""
    q, k = (t.unflatten(1, (-1, 2)) for t in (q, k))  # (B, P, 2, T, D)
    return row_block_attention(
        q, k, layer.wide(v), factor=factor, causal=causal, device_type=layer.device_type
    )


def sdpa(layer: Differential, q: Tensor, k: Tensor, v: Tensor, factor: Tensor, causal: bool) -> Tensor:
    """Each map with one half of the values, and with the other."""
    halves = [
        F.scaled_dot_product_attention(q, k, half.repeat_interleave(2, dim=1), is_causal=causal)
        for half in (v[:, ::2], v[:, 1::2])
    ]
    maps = torch.cat(halves, dim=-1).unflatten(1, (-1, 2))  # (B, P, 2, T, 2·D)
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    y: Tensor = maps[:, :, 0] - factor * maps[:, :, 1]
    return y


class Differential(SequenceMixer):
    """(softmax(Q₁K₁ᵀ/√D) − λ softmax(Q₂K₂ᵀ/√D)) V of each pair of heads, normalised and scaled.

    Two neighbouring heads are the maps of a pair, and their values side by side, 2·D channels wide, are its
    values, so that a layer has as many parameters as dense attention with H heads, but for 6·D. What is
    common to both maps, such as weight on tokens without meaning, is cancelled. λ is common to a layer:
    e^(λ_q1·λ_k1) − e^(λ_q2·λ_k2) + λ_init, with λ_init = 0.8 − 0.6·e^(−0.3·l) for layer l from 0 on. The
    outputs of a pair are divided by their root mean square, and multiplied by learnt scales and 1 − λ_init.

    FLOPs are those of dense attention: the values are twice as wide, but are multiplied once for two maps.

    Deviation: positions are rotary with channels i and i + D/2 as a pair, as in every variant of this
    project. The bidirectional form is ours; the formula is the same.
    """

    Config = DifferentialConfig
    config: DifferentialConfig
    position_scheme = "rotary"
    no_shared_keys = "its heads are pairs, each with its own two heads of keys"
    info = Info(
        paper="Ye et al. 2024, Differential Transformer, arXiv:2410.05258",
        family="dense",
        complexity=Complexity(time=2, memory=2, formula="T²", source="as dense attention"),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "rows": Impl(
            run=rows,
            flop_overhead_reason="a block of queries computes the scores that any of its queries needs",
            auto_on=("cpu",),
        ),
        "sdpa": Impl(
            run=sdpa,
            flop_overhead_reason="each map is computed twice, for the halves of the values",
            auto_on=(Impl.OTHER_DEVICES,),
        ),
    }

    def __init__(self, config: DifferentialConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        if reason := self._odd_heads(dims):
            raise ValueError(reason)
        self.projections = Projections(dims)
        self.lambdas = nn.Parameter(torch.empty(4, dims.head_dim))
        nn.init.normal_(self.lambdas, std=0.1)
        self.scale = nn.Parameter(torch.ones(2 * dims.head_dim))

    @staticmethod
    def _odd_heads(dims: Dims) -> str | None:
        if dims.heads % 2:
            return f"heads={dims.heads}: two heads are a pair of maps; allowed are even numbers"
        return None

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Heads are pairs."""
        return super().unsupported(config, dims, causal=causal) or cls._odd_heads(dims)

    @property
    def initial_factor(self) -> float:
        """λ_init, which depends on the depth of the layer."""
        return 0.8 - 0.6 * math.exp(-0.3 * self.layer)

    def factor(self) -> Tensor:
        """λ, a number in float32 or wider."""
        rows = self.lambdas.to(torch.promote_types(self.lambdas.dtype, torch.float32))
        q_1, k_1, q_2, k_2 = rows.unbind(0)
        return (q_1 * k_1).sum().exp() - (q_2 * k_2).sum().exp() + self.initial_factor

    @staticmethod
    def wide(v: Tensor) -> Tensor:
        """Values of heads (B, H, T, D) → of pairs (B, P, T, 2·D)."""
        pairs: Tensor = v.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
        return pairs

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        return MixerOut(self._merge(self.run_impl(self, q, k, v, self.factor(), ctx.causal), v.dtype))

    def _merge(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise the outputs of pairs (B, P, T, 2·D), and project them: (B, T, C).

        The norm is computed in float32 or wider, because its gradient is the part of a vector that is
        orthogonal to y, to which the outputs of the two maps are nearly parallel.
        """
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        scale = (self.scale * (1 - self.initial_factor)).to(y.dtype)
        normal = F.rms_norm(y.transpose(1, 2), scale.shape, scale, EPSILON)
        merged: Tensor = self.projections.out(normal.flatten(2).to(dtype))
        return merged

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Pair by pair, with the equations of the paper."""
        q, k, v = self.projections.split(x, ctx.positions)
        later = ~self.attention_mask(x.shape[1], causal=ctx.causal).to(x.device)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(later, float("-inf"))
        weights = scores.softmax(-1)
        outputs = []
        for pair in range(0, self.dims.heads, 2):
            values = torch.cat([v[:, pair], v[:, pair + 1]], dim=-1)
            y = (weights[:, pair] - self.factor().to(x.dtype) * weights[:, pair + 1]) @ values
            y = y / (y.square().mean(-1, keepdim=True) + EPSILON).sqrt() * self.scale
            outputs.append((1 - self.initial_factor) * y)
        return torch.cat(outputs, dim=-1) @ self.projections.out.weight.T

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys that the objective allows."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)

    def cost(self, work: Workload) -> Cost:
        """For each pair of heads and of tokens, two scores of D channels, and one sum of 2·D channels."""
        pairs = work.seq_len * (work.seq_len + 1) // 2 if work.causal else work.seq_len**2
        attention = 4 * work.batch_size * work.inner_dim * pairs
        return Cost({"projections": Projections.flops(work), "attention": attention})

    # --- decoding -------------------------------------------------------------------------------------

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of each token."""
        return 2 * work.batch_size * work.seq_len * work.inner_dim * work.element_bytes

    def decoding_bytes(self, work: Workload) -> int:
        """Those of all tokens."""
        return self.state_bytes(work)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> PairCache:
        """The keys and values."""
        shape = batch_size, self.dims.heads, max_len, self.dims.head_dim
        return PairCache(clock, max_len, shape, dtype, self.scale.device)

    def step(self, x: Tensor, state: PairCache) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        begin, tokens = state.clock.position, x.shape[1]
        end = begin + tokens
        state.keys[:, :, begin:end], state.values[:, :, begin:end] = k, self.wide(v)
        if not begin and tokens > 1:
            return self._merge(self.run_impl(self, q, k, v, self.factor(), True), v.dtype)
        scores = q @ state.keys[:, :, :end].to(q.dtype).mT * q.shape[-1] ** -0.5
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        if tokens > 1:
            index = torch.arange(end, device=x.device)
            scores = scores.masked_fill(index > index[begin:, None], float("-inf"))
        first, second = scores.softmax(-1).unflatten(1, (-1, 2)).unbind(2)
        weights = (first - self.factor() * second).to(q.dtype)
        return self._merge(weights @ state.values[:, :, :end].to(q.dtype), v.dtype)


class PairCache(DecodingState):
    """Keys (B, H, T, D) and values of pairs (B, P, T, 2·D) of all tokens."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        batch, heads, tokens, head_dim = shape
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(batch, heads // 2, tokens, 2 * head_dim, dtype=dtype, device=device)
