"""Linear attention with the features elu(x) + 1 (Katharopoulos 2020, arXiv:2006.16236).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.projections import Projections
from variants.ops.recurrences.full_sums import full_flops, full_sums
from variants.ops.recurrences.gated_scan import FLOP_OVERHEAD, gated_scan, scan_flops
from variants.ops.recurrences.scan_features import EluPlusOne
from variants.ops.recurrences.scan_state import ScanState


@dataclass(frozen=True, kw_only=True)
class LinearTransformerConfig(VariantConfig):
    """Knobs of the causal sums."""

    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Causal weights are computed pair by pair within it; earlier chunks are one
    sum. It changes the cost, and not the outputs."""


class LinearTransformer(SequenceMixer):
    """Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s) with φ(x) = elu(x) + 1, over s ≤ t if causal.

    Deviations from the paper: positions are rotary, and applied before the features. Nothing is added to the
    denominators: features are positive down to x = -87 in float32, because elu(x) + 1 is computed as exp(x)
    for negative x. The authors' code adds 1e-6.
    """

    Config = LinearTransformerConfig
    config: LinearTransformerConfig
    position_scheme = "rotary"
    info = Info(
        paper="Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236",
        family="kernels",
        complexity=Complexity(
            time=1, memory=1, formula="T·D²", source="Katharopoulos 2020, §3.2 and §3.3", survey=1
        ),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = FLOP_OVERHEAD

    def __init__(self, config: LinearTransformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        with torch.autocast(x.device.type, enabled=False):  # sums need float32
            if ctx.causal:
                y = gated_scan(
                    q,
                    k,
                    v,
                    features=EluPlusOne(),
                    normalise=True,
                    chunk=self.config.chunk,
                    device_type=self.device_type,
                )
            else:
                y = full_sums(q, k, v, features=EluPlusOne(), device_type=self.device_type)
        return MixerOut(self.projections.merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The quadratic form (eq. 4): the weight of each pair, normalised over the allowed keys."""
        q, k, v = self.projections.split(x, ctx.positions)
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT  # (B, H, T, T)
        weights = weights * self.attention_mask(x.shape[1], causal=ctx.causal).to(weights)
        return self.projections.merge(weights / weights.sum(-1, keepdim=True) @ v)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> ScanState:
        """The sums over keys."""
        head_dim, device = self.dims.head_dim, self.projections.out.weight.device
        shape = batch_size, self.dims.heads, head_dim, head_dim
        return ScanState(clock, max_len, shape, normalise=True, dtype=dtype, device=device)

    def step(self, x: Tensor, state: ScanState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        q, k, v = self.projections.split_next(x, state.clock)
        with torch.autocast(x.device.type, enabled=False):
            y = state.read_next(
                q, k, v, features=EluPlusOne(), chunk=self.config.chunk, device_type=self.device_type
            )
        return self.projections.merge(y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow."""
        shape = work.batch_size, work.heads, work.head_dim, work.head_dim
        return ScanState.bytes(shape, normalise=True, element_bytes=work.element_bytes)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums over keys of each head: D × D of the values, and D of the normaliser."""
        return 4 * work.batch_size * work.inner_dim * (work.head_dim + 1)

    def cost(self, work: Workload) -> Cost:
        """Projections, sums over keys, products of queries with the sums and, if causal, pairs within a
        chunk. The normaliser counts as one more channel of the values."""
        d = work.head_dim
        if work.causal:
            each = scan_flops(work.seq_len, d, d + 1, chunk=self.config.chunk)
        else:
            each = full_flops(work.seq_len, d, d + 1)
        return Cost(
            {"projections": Projections.flops(work), "attention": work.batch_size * work.heads * each}
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys or, if causal, the keys up to the query."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
