"""α-entmax attention: most weights are exactly 0 (Correia 2019, arXiv:1909.00015, §3).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; L maximum length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
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
from variants.knobs import knob
from variants.ops.entmax import entmax, entmax_attention
from variants.ops.projections import Projections

LEAST_ALPHA = 1.01
"""Nearer to 1, the power m = 1/(α − 1) of a float32 number has lost too many digits."""


@dataclass(frozen=True, kw_only=True)
class EntmaxConfig(VariantConfig):
    """Knobs of the normalisation."""

    alpha: float = knob(1.5, least=1.01, most=2)
    """The α of entmax. Near 1 it is softmax; 2 is sparsemax, the projection onto the simplex. With
    `learn_alpha`, the first value."""
    learn_alpha: bool = False
    """Whether each head learns its α, between 1.01 and 2 (§3)."""

    def __post_init__(self) -> None:
        if self.learn_alpha:
            allowed = f"above {LEAST_ALPHA} and below 2 with learn_alpha=true"
            self.require("alpha", LEAST_ALPHA < self.alpha < 2, allowed)


class Entmax(SequenceMixer):
    """entmax_α(QKᵀ/√D)V. The weights are [(α − 1)s − τ]₊^{1/(α − 1)} for the scores s, with τ so that they
    sum up to 1. Scores that the objective forbids are −∞ before τ is computed.

    All scores are computed, so the cost is that of dense attention and more, but no weights are stored: they
    are computed in pieces, and again in the backward pass. τ is found by Newton's method in float32 or wider,
    for any α; α=1.5 and α=2 need no powers.

    With `learn_alpha`, α = 1.01 + 0.99·sigmoid(a) with one a for each head.

    Deviations from the paper: positions are rotary. The paper has α = 1 + sigmoid(a); here powers stay within
    the range of float32. All a start with the α of the knob; the paper draws them. α is at most 2, because
    weights have unbounded gradients above.
    """

    Config = EntmaxConfig
    config: EntmaxConfig
    position_scheme = "rotary"
    info = Info(
        paper="Correia et al. 2019, Adaptively Sparse Transformers, arXiv:1909.00015",
        family="learned patterns",
        complexity=Complexity(
            time=2, memory=2, formula="T²", source="Correia 2019, §3: all scores", survey=2
        ),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = (
        "queries are computed in strips, with all keys that any query of the strip may read"
    )

    def __init__(self, config: EntmaxConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        if config.learn_alpha:
            logit = math.log(config.alpha - LEAST_ALPHA) - math.log(2 - config.alpha)
            self.alpha_logits = nn.Parameter(torch.full((dims.heads,), logit))

    @property
    def alpha(self) -> float | Tensor:
        """α, or that of each head (H,)."""
        if not self.config.learn_alpha:
            return float(self.config.alpha)
        return LEAST_ALPHA + (2 - LEAST_ALPHA) * self.alpha_logits.sigmoid()

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        y = entmax_attention(q, k, v, self.alpha, causal=ctx.causal, device_type=self.device_type)
        return MixerOut(self.projections.merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """All scores; τ by bisection. A last step that is differentiated gives τ its gradient."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        alpha = torch.as_tensor(self.alpha, dtype=torch.promote_types(q.dtype, torch.float32))
        alpha = alpha.to(q.device).expand(self.dims.heads)[:, None, None]
        scores = (q @ k.mT).to(alpha.dtype) / math.sqrt(q.shape[-1])
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        allowed = allowed.tril() if ctx.causal else allowed
        z = (scores * (alpha - 1)).masked_fill(~allowed, float("-inf"))

        def weights(tau: Tensor) -> Tensor:
            return (z - tau).clamp(min=0).pow(1 / (alpha - 1))

        with torch.no_grad():
            low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
            for _ in range(60):
                middle = (low + high) / 2
                above = weights(middle).sum(-1, keepdim=True) >= 1
                low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            slopes = torch.where(z > low, (z - low).clamp(min=0).pow(1 / (alpha - 1) - 1), 0)
        total = weights(low).sum(-1, keepdim=True)
        tau = low + (total - 1) * (alpha - 1).detach() / slopes.sum(-1, keepdim=True)
        return self.projections.merge(weights(tau).to(v.dtype) @ v)

    def cost(self, work: Workload) -> Cost:
        """Scores and weighted sum: 4·D for each allowed pair. Weights of 0 are counted; τ is not."""
        tokens = work.seq_len
        pairs = tokens * (tokens + 1) // 2 if work.causal else tokens**2
        attention = 4 * work.batch_size * work.inner_dim * pairs
        return Cost({"projections": Projections.flops(work), "attention": attention})

    def state_bytes(self, work: Workload) -> int:
        """Bytes of all keys and values: a later query may give a weight to each."""
        return 2 * work.batch_size * work.seq_len * work.inner_dim * work.element_bytes

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> AllKeys:
        """All keys and values."""
        shape = batch_size, self.dims.heads, max_len, self.dims.head_dim
        return AllKeys(clock, shape, dtype, self.projections.qkv.weight.device)

    def decoding_bytes(self, work: Workload) -> int:
        """Those of `state_bytes`."""
        return self.state_bytes(work)

    def step(self, x: Tensor, state: AllKeys) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence."""
        q, k, v = self.projections.split_next(x, state.clock)
        begin, tokens = state.clock.position, x.shape[1]
        end = begin + tokens
        state.keys[:, :, begin:end], state.values[:, :, begin:end] = k, v
        alpha = self.alpha
        if not begin and tokens > 1:
            y = entmax_attention(q, k, v, alpha, causal=True, device_type=self.device_type)
            return self.projections.merge(y)
        k, v = (held[:, :, :end].to(q.dtype) for held in (state.keys, state.values))
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(begin + 1)
        by_head = alpha[:, None, None].to(scores.dtype) if isinstance(alpha, Tensor) else alpha
        weights = entmax(scores.masked_fill(later, float("-inf")), by_head)
        return self.projections.merge(weights.to(v.dtype) @ v)


class AllKeys(DecodingState):
    """The keys and values of all tokens: (B, H, L, D) each."""

    def __init__(
        self, clock: Clock, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(clock, shape[2])
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
