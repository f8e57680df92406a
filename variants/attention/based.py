"""The linear attention of Based, with features of a Taylor series (Arora 2024, arXiv:2402.18668).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, F channels of queries and keys.
"""

from __future__ import annotations

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
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.projections import rotary, rotary_next
from variants.ops.recurrences.full_sums import full_flops, full_sums
from variants.ops.recurrences.gated_scan import FLOP_OVERHEAD, gated_scan, scan_flops
from variants.ops.recurrences.scan_features import Taylor
from variants.ops.recurrences.scan_state import ScanState


@dataclass(frozen=True, kw_only=True)
class BasedConfig(VariantConfig):
    """Knobs of the features and of the causal sums."""

    feature_channels: int = knob(16, least=2, multiple=2)
    """F, the channels of queries and keys, of which the features are the products of up to two."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Causal weights are computed pair by pair within it; earlier chunks are one
    sum. It changes the cost, and not the outputs."""


class Based(SequenceMixer):
    """Σ_s w_ts v_s / Σ_s w_ts with w_ts = 1 + s + s²/2 and s = q_t·k_s/√F, over s ≤ t if causal.

    w is the Taylor series of exp(s). It is at least ½, so no denominator is near 0. It is a scalar product of
    1 + F + F(F + 1)/2 features: 153 for F = 16. The paper has 273, with each product of two channels twice;
    the weights are the same.

    Parameters: 2·C² of values and output, and 2·H·F·C of queries and keys; dense attention has 4·C².

    This is one of three kinds of layer in the models of the paper. The others are attention to a window of 64
    tokens and gated convolutions: `variant=hybrid` has such models, with layers=[based,longformer(window=64)]
    for example.

    Deviations from the paper: positions are rotary, and applied before the features; in the paper, the
    convolutions tell the order of the tokens. Nothing is added to the denominators.
    """

    Config = BasedConfig
    config: BasedConfig
    position_scheme = "rotary"
    info = Info(
        paper="Arora et al. 2024, Based, arXiv:2402.18668",
        family="kernels",
        complexity=Complexity(
            time=1, memory=1, formula="T·F²·D", source="Arora 2024 (linear attention with these features)"
        ),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = FLOP_OVERHEAD

    def __init__(self, config: BasedConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.qk = nn.Linear(dims.d_model, 2 * dims.heads * config.feature_channels, bias=False)
        self.v = nn.Linear(dims.d_model, dims.inner_dim, bias=False)
        self.out = nn.Linear(dims.inner_dim, dims.d_model, bias=False)

    def _heads(self, qk: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, H, T, F) of both in (B, T, 2·H, F), and values (B, H, T, D) of tokens x."""
        q, k = qk.transpose(1, 2).chunk(2, dim=1)
        return q, k, self.v(x).unflatten(-1, (self.dims.heads, -1)).transpose(1, 2)

    def _split(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        qk = self.qk(x).unflatten(-1, (2 * self.dims.heads, -1))
        return self._heads(rotary(qk, positions, self.dims.rotary_base), x)

    def _merge(self, y: Tensor) -> Tensor:
        """(B, H, T, D) → (B, T, C), by the output projection."""
        merged: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return merged

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self._split(x, ctx.positions)
        with torch.autocast(x.device.type, enabled=False):  # sums need float32
            if ctx.causal:
                y = gated_scan(
                    q,
                    k,
                    v,
                    features=Taylor(),
                    normalise=True,
                    chunk=self.config.chunk,
                    device_type=self.device_type,
                )
            else:
                y = full_sums(q, k, v, features=Taylor(), device_type=self.device_type)
        return MixerOut(self._merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The quadratic form: the series of each score, normalised over the allowed keys."""
        q, k, v = self._split(x, ctx.positions)
        scores = q @ k.mT / self.config.feature_channels**0.5  # (B, H, T, T)
        weights = 1 + scores + scores.square() / 2
        weights = weights * self.attention_mask(x.shape[1], causal=ctx.causal).to(weights)
        return self._merge(weights / weights.sum(-1, keepdim=True) @ v)

    @property
    def _features(self) -> int:
        return Taylor().width(self.config.feature_channels, None)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> ScanState:
        """The sums over keys."""
        shape = batch_size, self.dims.heads, self._features, self.dims.head_dim
        device = self.out.weight.device
        return ScanState(clock, max_len, shape, normalise=True, dtype=dtype, device=device)

    def step(self, x: Tensor, state: ScanState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        qk = self.qk(x).unflatten(-1, (2 * self.dims.heads, -1))
        q, k, v = self._heads(rotary_next(qk, state.clock, self.dims.rotary_base), x)
        with torch.autocast(x.device.type, enabled=False):
            y = state.read_next(
                q, k, v, features=Taylor(), chunk=self.config.chunk, device_type=self.device_type
            )
        return self._merge(y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow."""
        shape = work.batch_size, work.heads, self._features, work.head_dim
        return ScanState.bytes(shape, normalise=True, element_bytes=work.element_bytes)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums over keys of each head: m × D of the values, and m of the normaliser."""
        return 4 * work.batch_size * work.heads * self._features * (work.head_dim + 1)

    def cost(self, work: Workload) -> Cost:
        """Projections, sums over keys, products of queries with the sums and, if causal, pairs within a
        chunk. The normaliser counts as one more channel of the values. Features are elementwise work."""
        t, m, d = work.seq_len, self._features, work.head_dim
        each = scan_flops(t, m, d + 1, chunk=self.config.chunk) if work.causal else full_flops(t, m, d + 1)
        channels = 2 * work.heads * self.config.feature_channels + 2 * work.inner_dim
        return Cost(
            {
                "projections": 2 * work.batch_size * t * work.d_model * channels,
                "attention": work.batch_size * work.heads * each,
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys or, if causal, the keys up to the query."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
