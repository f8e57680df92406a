"""Linear attention whose keys decay at a fixed rate of each head, normalised and gated: `FixedDecayMixer`.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from variants.base import (
    Clock,
    Context,
    Cost,
    Dims,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.patterns import masks
from variants.ops.projections import Projections
from variants.ops.recurrences.gated_norm import GatedNorm, gated_norm
from variants.ops.recurrences.gated_scan import FLOP_OVERHEAD, gated_scan, scan_flops
from variants.ops.recurrences.scan_features import FeatureMap
from variants.ops.recurrences.scan_state import ScanState

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries and keys before the feature map, and values: each (B, H, T, D)."""


@dataclass(frozen=True, kw_only=True)
class FixedDecayConfig(VariantConfig):
    """Knobs of the causal sums."""

    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Weights are computed pair by pair within it; earlier chunks are one sum. It
    changes the cost, and not the outputs."""


class FixedDecayMixer(SequenceMixer):
    """W_out of the normalised and gated y_t = Σ_{s ≤ t} γ^(t − s) (φ(q_t)·φ(k_s)) v_s, with γ of each head.

    Subclasses state φ, γ, the norm and what precedes the sums. Parameters: 5·C², of which C² are those of the
    gate; dense attention has 4·C².
    """

    config: FixedDecayConfig
    features: ClassVar[FeatureMap]
    """φ."""
    norm_of_heads: ClassVar[bool] = True
    """Normalise each head by itself; else all channels together."""
    flop_overhead_reason = FLOP_OVERHEAD

    def __init__(self, config: FixedDecayConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.gate = nn.Linear(dims.d_model, dims.inner_dim, bias=False)
        self.scale: nn.Parameter | None = None
        """Weights of the channels after the norm; None: 1."""

    @property
    @abstractmethod
    def norm(self) -> GatedNorm:
        """The norm and the gate."""

    @abstractmethod
    def log_decay(self, device: torch.device) -> Tensor:
        """log γ (H,), float64: a function of head and layer."""

    def heads_of(self, x: Tensor, positions: Tensor | None) -> Heads:
        """Project tokens x (B, T, C)."""
        return self.projections.split(x, positions)

    def next_heads(self, x: Tensor, clock: Clock) -> Heads:
        """Project the next tokens of sequences that are decoded."""
        return self.projections.split_next(x, clock)

    def _logs(self, v: Tensor) -> Tensor:
        """log γ for all tokens of v (B, H, T, D), as a view (B, H, T, 1)."""
        logs = self.log_decay(v.device).to(torch.promote_types(v.dtype, torch.float32))
        return logs[:, None, None].expand(*v.shape[:3], 1)

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Norm, gate and output projection of y (B, H, T, D)."""
        y = y.transpose(1, 2)
        y = y if self.norm_of_heads else y.flatten(2).unsqueeze(2)
        gated = gated_norm(self.norm, y, self.gate(x), self.scale, device_type=self.device_type)
        out: Tensor = self.projections.out(gated.flatten(2))
        return out

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.heads_of(x, ctx.positions)
        with torch.autocast(x.device.type, enabled=False):  # sums need float32
            y = gated_scan(
                q,
                k,
                v,
                self._logs(v),
                features=self.features,
                chunk=self.config.chunk,
                device_type=self.device_type,
            )
        return MixerOut(self._finish(x, y))

    def weighted_sums(self, phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
        """The quadratic form, for references: all pairs, with their decays written out. (B, H, T, D)."""
        token = torch.arange(v.shape[2], device=v.device)
        distance = (token[:, None] - token).to(v.dtype)
        decay = self.log_decay(v.device).to(v.dtype).exp()[:, None, None] ** distance.clamp(min=0)
        return (phi_q @ phi_k.mT * decay).masked_fill(distance < 0, 0) @ v

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> ScanState:
        """The decayed sums over keys."""
        head_dim, device = self.dims.head_dim, self.projections.out.weight.device
        shape = batch_size, self.dims.heads, head_dim, head_dim
        return ScanState(clock, max_len, shape, normalise=False, dtype=dtype, device=device)

    def step(self, x: Tensor, state: ScanState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        q, k, v = self.next_heads(x, state.clock)
        with torch.autocast(x.device.type, enabled=False):
            y = state.read_next(
                q,
                k,
                v,
                self._logs(v),
                features=self.features,
                chunk=self.config.chunk,
                device_type=self.device_type,
            )
        return self._finish(x, y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow."""
        shape = work.batch_size, work.heads, work.head_dim, work.head_dim
        return ScanState.bytes(shape, normalise=False, element_bytes=work.element_bytes)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums over keys of each head, D × D."""
        return 4 * work.batch_size * work.inner_dim * work.head_dim

    def cost(self, work: Workload) -> Cost:
        """Projections, with that of the gate; sums over keys, products of queries with the sums and pairs
        within a chunk."""
        gate = 2 * work.batch_size * work.seq_len * work.d_model * work.inner_dim
        each = scan_flops(work.seq_len, work.head_dim, work.head_dim, chunk=self.config.chunk)
        return Cost(
            {
                "projections": Projections.flops(work) + gate,
                "attention": work.batch_size * work.heads * each,
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """The keys up to the query: no decay is 0."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
