"""Gated linear attention: each channel of the keys decays by a gate of its own (Yang 2023, arXiv:2312.06635).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, K = D/2 channels of queries and keys.
"""

from __future__ import annotations

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
    Dims,
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.recurrences.channel_chunks import DecayMap, SigmoidRoot
from variants.ops.recurrences.channel_scan import (
    FLOP_OVERHEAD,
    ChannelScanState,
    channel_recurrence,
    channel_scan,
    channel_scan_flops,
)
from variants.ops.recurrences.fla_kernels import KERNELS
from variants.ops.recurrences.fla_scans import fla_impl, scan
from variants.ops.recurrences.gated_norm import GatedNorm, gated_norm

EPS = 1e-5
"""Added to the mean square of the channels of a head."""


@dataclass(frozen=True, kw_only=True)
class GlaConfig(VariantConfig):
    """Knobs of the gates and of the causal sums."""

    rank: int = knob(16, least=1)
    """Rank of the map from a token to the logits of its decays."""
    temperature: float = knob(16.0, above=0.0)
    """Root of the sigmoid: with a large one, decays are near 1 at first."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Weights are computed pair by pair within it; earlier chunks are one sum. It
    changes the cost, and not the outputs."""
    impl: Literal["auto", "plain", "fla"] = knob("auto", younger=True)
    """Implementation of the causal sums. plain: batched matrix products, sums in float32. fla: kernels of the
    package fla-core, in half precision; untried. auto: plain. Decoding has one implementation."""

    def __post_init__(self) -> None:
        if self.impl == "fla":
            chunks = KERNELS["gla"].chunks
            self.require("chunk", self.chunk in chunks, f"{', '.join(map(str, chunks))} with impl=fla")


def plain(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, decay: DecayMap, chunk: int, device_type: str
) -> Tensor:
    """See `channel_scan`."""
    return channel_scan(q, k, v, logits, decay=decay, chunk=chunk, device_type=device_type)


def fla(
    q: Tensor, k: Tensor, v: Tensor, logits: Tensor, decay: DecayMap, chunk: int, device_type: str
) -> Tensor:
    """The same by fla-core's kernels."""
    return scan("gla", q, k, v, None, decay.logs(logits.float()), chunk=chunk, dtype=v.dtype)


class Gla(SequenceMixer):
    """W_O (swish(W_G x) ∘ norm(y)), y_t = S_tᵀ q_t / √K, with S_t = diag(α_t) S_{t−1} + k_t v_tᵀ.

    α_t = sigmoid(W₂ W₁ x_t + b)^(1/τ) has a decay for each channel of the keys, with W₁ of low rank. The norm
    is an RMS norm of each head, with weights that the heads share, as in the authors' code.

    Parameters: 4·C², as of dense attention, and the small maps of the decays: queries and keys have half as
    many channels as values, and the gate has the C² which that saves.

    Deviations from the paper: the gate of the output has no bias, as all projections here. There are no
    positions but the decays, as in the paper.
    """

    Config = GlaConfig
    config: GlaConfig
    position_scheme = "relative"
    info = Info(
        paper="Yang et al. 2023, Gated Linear Attention Transformers, arXiv:2312.06635",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·K·(D + c)", source="Yang 2023, abstract"),
        caps=Caps(causal=True, bidirectional=False),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "plain": Impl(run=plain, flop_overhead_reason=FLOP_OVERHEAD, auto_on=("cpu", Impl.OTHER_DEVICES)),
        "fla": fla_impl("gla", fla, half_keys=True),
    }

    def __init__(self, config: GlaConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        inner = dims.inner_dim
        self.qkv = nn.Linear(dims.d_model, 2 * inner, bias=False)
        self.low = nn.Linear(dims.d_model, config.rank, bias=False)  # W₁
        self.decay = nn.Linear(config.rank, inner // 2)  # W₂ and b
        self.gate = nn.Linear(dims.d_model, inner, bias=False)
        self.scale = nn.Parameter(torch.ones(dims.head_dim))
        self.out = nn.Linear(inner, dims.d_model, bias=False)

    @property
    def _map(self) -> SigmoidRoot:
        return SigmoidRoot(self.config.temperature)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys (B, H, T, K) and values (B, H, T, D), and the logits of the decays (B, H, T, K)."""
        inner = self.dims.inner_dim
        q, k, v = self.qkv(x).split([inner // 2, inner // 2, inner], dim=-1)
        heads = (part.unflatten(-1, (self.dims.heads, -1)) for part in (q, k, v, self.decay(self.low(x))))
        q, k, v, logits = (part.transpose(1, 2) for part in heads)
        return q, k, v, logits

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        """Norm, gate and output projection of y·√K (B, H, T, D)."""
        form = GatedNorm("silu", eps=EPS * (self.dims.head_dim // 2))
        gated = gated_norm(form, y.transpose(1, 2), self.gate(x), self.scale, device_type=self.device_type)
        out: Tensor = self.out(gated.flatten(2))
        return out

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v, logits = self._project(x)
        with torch.autocast(x.device.type, enabled=False):  # sums need float32
            y = self.run_impl(q, k, v, logits, self._map, self.config.chunk, self.device_type)
        return MixerOut(self._finish(x, y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The recurrence, token by token, with the RMS norm of torch."""
        q, k, v, logits = self._project(x)
        y = channel_recurrence(q, k, v, F.logsigmoid(logits) / self.config.temperature)
        y = y / (self.dims.head_dim // 2) ** 0.5
        y = F.rms_norm(y, y.shape[-1:], self.scale, eps=EPS).transpose(1, 2).flatten(2)
        reference: Tensor = self.out(F.silu(self.gate(x)) * y)
        return reference

    def _shape(self, dims: Dims, batch_size: int) -> tuple[int, int, int, int]:
        return batch_size, dims.heads, dims.head_dim // 2, dims.head_dim

    def init_state(
        self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype
    ) -> ChannelScanState:
        """The decayed sums over keys."""
        shape = self._shape(self.dims, batch_size)
        return ChannelScanState(clock, max_len, shape, dtype, self.out.weight.device)

    def step(self, x: Tensor, state: ChannelScanState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        q, k, v, logits = self._project(x)
        with torch.autocast(x.device.type, enabled=False):
            y = state.read_next(
                q,
                k,
                v,
                logits,
                decay=self._map,
                chunk=self.config.chunk,
                device_type=self.device_type,
            )
        return self._finish(x, y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow."""
        return max(4, work.element_bytes) * work.batch_size * work.inner_dim * (work.head_dim // 2)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums over keys of each head, K × D."""
        return 4 * work.batch_size * work.inner_dim * (work.head_dim // 2)

    def cost(self, work: Workload) -> Cost:
        """Projections, with those of the gate and of the decays; sums over keys, products of queries with the
        sums and pairs within a chunk."""
        tokens, inner, rank = work.batch_size * work.seq_len, work.inner_dim, self.config.rank
        each = channel_scan_flops(work.seq_len, work.head_dim // 2, work.head_dim, chunk=self.config.chunk)
        return Cost(
            {
                "projections": 2 * tokens * (4 * work.d_model * inner + rank * (work.d_model + inner // 2)),
                "attention": work.batch_size * work.heads * each,
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """None: content decides how far a query reads."""
        return None
