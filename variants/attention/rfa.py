"""Random feature attention: a Gaussian kernel of unit vectors, with an optional gate (Peng 2021,
arXiv:2103.02143).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, n directions.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from variants.knobs import knob
from variants.ops.features.unit_vectors import unit_vectors
from variants.ops.patterns import masks
from variants.ops.projections import Projections
from variants.ops.recurrences.full_sums import full_flops, full_sums
from variants.ops.recurrences.gated_scan import FLOP_OVERHEAD, gated_scan, scan_flops
from variants.ops.recurrences.scan_features import SinesAndCosines
from variants.ops.recurrences.scan_state import ScanState


@dataclass(frozen=True, kw_only=True)
class RfaConfig(VariantConfig):
    """Knobs of the random features, of the gate and of the sums."""

    n_features: int = knob(256, least=2, multiple=2)
    """Number of features, a sine and a cosine of each direction: twice the D of the paper."""
    gate: bool = False
    """Let earlier tokens decay by a learnt gate of each head and token ("RFA-Gate"), causal only."""
    floor: float = knob(0.01, above=0.0, below=1.0)
    """Least denominator, as a share of the total weight of the keys; smaller ones are replaced by it."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Causal weights are computed pair by pair within it; earlier chunks are one
    sum. It changes the cost, and not the outputs."""


class RfaState(DecodingState):
    """The sums over keys and, with a gate, the logarithm of the product of all gates, in float64."""

    def __init__(self, sums: ScanState, decayed: Tensor | None) -> None:
        super().__init__(sums.clock, sums.max_len)
        self.sums, self.decayed = sums, decayed

    def parts(self) -> Sequence[DecodingState]:
        """The sums."""
        return (self.sums,)


class Rfa(SequenceMixer):
    """Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), with φ(x) = [sin ω·σx̂, cos ω·σx̂]/√n and x̂ = x/|x|.

    φ(q)·φ(k) estimates exp(−|σ(q̂ − k̂)|²/2), with ω from a standard normal distribution and a learnt σ of each
    head and channel, at first 1 (by the reparametrisation of the authors' code). With a gate
    g_t = sigmoid(w·x_t + b), both sums decay by g_t, and the weight of key t is 1 − g_t.

    An estimate may be 0 or negative, and so may a denominator. The authors' code replaces denominators below
    1, with features of another scale, by 1, whatever the number of keys. Here the limit is `floor` times the
    sum of the weights of all keys, which is t without a gate and 1 − Π g with one, so it does not change with
    the length. It has no gradient.

    Deviations from the paper: positions are rotary, and applied before the norm. The heads of a layer share
    their directions, which are drawn once; the paper draws others for each batch, from a pool. Directions are
    independent. Sequences that are not causal have no gate.
    """

    Config = RfaConfig
    config: RfaConfig
    position_scheme = "rotary"
    info = Info(
        paper="Peng et al. 2021, Random Feature Attention, arXiv:2103.02143",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·m·D", source="Peng 2021, abstract", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = FLOP_OVERHEAD

    directions: Tensor

    def __init__(self, config: RfaConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.scale = nn.Parameter(torch.ones(dims.heads, 1, dims.head_dim))  # σ
        self.gate = nn.Linear(dims.d_model, dims.heads) if config.gate else None
        directions = torch.randn(config.n_features // 2, dims.head_dim, dtype=torch.float32)
        self.register_buffer("directions", directions)  # (n, D)

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """A gate needs an order of the tokens."""
        if not causal and getattr(config, "gate", False):
            return "gate=true has no bidirectional form: a decay needs an order of the tokens"
        return super().no_form(config, causal=causal)

    def _table(self, x: Tensor) -> Tensor:
        """The directions in float32, or wider if x is."""
        return self.directions.to(torch.promote_types(x.dtype, torch.float32))

    def _unit(self, x: Tensor) -> Tensor:
        """σx̂ (B, H, T, D), float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return unit_vectors(x.to(wide), self.scale.to(wide))

    def _logits(self, x: Tensor) -> Tensor | None:
        """The logits of the gates (B, H, T, 1), float32 or wider; None without a gate."""
        if self.gate is None:
            return None
        logits: Tensor = self.gate(x)
        return logits.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2).unsqueeze(-1)

    def _least(self, like: Tensor, logs: Tensor | None, before: int, decayed: Tensor | None) -> Tensor:
        """The least denominators (B, H, T, 1), after `before` tokens or gates of the product `decayed`."""
        if logs is None:
            keys = torch.arange(before + 1, before + like.shape[2] + 1, device=like.device, dtype=like.dtype)
            return (self.config.floor * keys)[:, None].expand(*like.shape[:2], -1, 1)
        product = logs.detach().double().cumsum(2)  # logarithm
        if decayed is not None:
            product = product + decayed
            decayed.copy_(product[:, :, -1:])
        return (-self.config.floor * product.expm1()).to(like.dtype)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        logits = self._logits(x)
        with torch.autocast(x.device.type, enabled=False):  # angles and sums need float32
            q, k, table = self._unit(q), self._unit(k), self._table(x)
            if ctx.causal:
                logs = None if logits is None else F.logsigmoid(logits)
                y = gated_scan(
                    q,
                    k,
                    v,
                    logs,
                    None if logits is None else (-logits).sigmoid(),
                    features=SinesAndCosines(),
                    table=table,
                    normalise=True,
                    least=self._least(q, logs, 0, None),
                    chunk=self.config.chunk,
                    device_type=self.device_type,
                )
            else:
                least = self.config.floor * x.shape[1]
                y = full_sums(
                    q,
                    k,
                    v,
                    features=SinesAndCosines(),
                    table=table,
                    least=least,
                    device_type=self.device_type,
                )
        return MixerOut(self.projections.merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The quadratic form: all pairs, times the gates between query and key, normalised."""
        q, k, v = self.projections.split(x, ctx.positions)
        tokens = x.shape[1]
        angles_q, angles_k = (F.normalize(t, dim=-1) * self.scale @ self._table(x).mT for t in (q, k))
        weights = angles_q.sin() @ angles_k.sin().mT + angles_q.cos() @ angles_k.cos().mT
        weights = weights / len(self.directions)  # (B, H, T, T)
        allowed = masks.matrix(masks.causal if ctx.causal else masks.all_keys, tokens).to(x.device)
        of_keys = allowed.to(weights).expand_as(weights)
        if self.gate is not None:
            logits = self.gate(x).transpose(1, 2)  # (B, H, T)
            logs = F.logsigmoid(logits).cumsum(-1)
            # the product of the gates s + 1 … t between key s and query t
            between = (logs[..., None] - logs[:, :, None]).masked_fill(~allowed, float("-inf")).exp()
            of_keys = between * (1 - logits.sigmoid())[:, :, None]
        weights = weights * of_keys
        least = self.config.floor * of_keys.sum(-1, keepdim=True).detach()
        return self.projections.merge(weights / weights.sum(-1, keepdim=True).maximum(least) @ v)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> RfaState:
        """The sums over keys, and the product of the gates."""
        shape = batch_size, self.dims.heads, self.config.n_features, self.dims.head_dim
        device = self.directions.device
        sums = ScanState(clock, max_len, shape, normalise=True, dtype=dtype, device=device)
        gates = (*shape[:2], 1, 1) if self.config.gate else None
        return RfaState(
            sums, None if gates is None else torch.zeros(gates, dtype=torch.float64, device=device)
        )

    def step(self, x: Tensor, state: RfaState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        q, k, v = self.projections.split_next(x, state.clock)
        logits = self._logits(x)
        with torch.autocast(x.device.type, enabled=False):
            q, k = self._unit(q), self._unit(k)
            logs = None if logits is None else F.logsigmoid(logits)
            y = state.sums.read_next(
                q,
                k,
                v,
                logs,
                None if logits is None else (-logits).sigmoid(),
                features=SinesAndCosines(),
                table=self._table(x),
                least=self._least(q, logs, state.clock.position, state.decayed),
                chunk=self.config.chunk,
                device_type=self.device_type,
            )
        return self.projections.merge(y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow."""
        shape = work.batch_size, work.heads, self.config.n_features, work.head_dim
        sums = ScanState.bytes(shape, normalise=True, element_bytes=work.element_bytes)
        return sums + (8 * work.batch_size * work.heads if self.config.gate else 0)

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums over keys of each head, m × D of the values and m of the normaliser, and
        with a gate of the product of all gates."""
        numbers = self.config.n_features * (work.head_dim + 1)
        return work.batch_size * work.heads * (4 * numbers + (8 if self.config.gate else 0))

    def cost(self, work: Workload) -> Cost:
        """Projections, gates, features of queries and keys, sums over keys, products of queries with the sums
        and, if causal, pairs within a chunk. The normaliser counts as one more channel of the values.
        Directions are constant."""
        t, m, d = work.seq_len, self.config.n_features, work.head_dim
        each = scan_flops(t, m, d + 1, chunk=self.config.chunk) if work.causal else full_flops(t, m, d + 1)
        gates = 2 * work.batch_size * t * work.d_model * work.heads if self.config.gate else 0
        return Cost(
            {
                "projections": Projections.flops(work) + gates,
                "features": work.batch_size * work.heads * 2 * t * m * d,
                "attention": work.batch_size * work.heads * each,
            },
            gradients={"features": 1},
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor | None:
        """All keys or, if causal, the keys up to the query. With a gate, content decides how far."""
        return None if self.config.gate else masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
