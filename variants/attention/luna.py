"""Luna: attention in two steps through a packed sequence of fixed length (Ma 2021, arXiv:2106.01540).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, l packed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from variants.ops import masks
from variants.ops.gated_scan import FLOP_OVERHEAD, gated_scan, scan_flops
from variants.ops.projections import rotary, rotary_next
from variants.ops.scan_features import Identity
from variants.ops.scan_state import ScanState


@dataclass(frozen=True, kw_only=True)
class LunaConfig(VariantConfig):
    """Knobs of the packed sequence and of the causal sums."""

    length: int = knob(64, least=1, unit="positions")
    """Length of the packed sequence, which every token reads."""
    activation: Literal["elu", "softplus"] = "elu"
    """Weights of the causal pack, in place of softmax: elu(s) + 1, or log(1 + exp(s))."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk, at most. Causal sums are computed pair by pair within it; earlier chunks are one
    sum. It changes the cost, and not the outputs."""


class LunaState(DecodingState):
    """The causal sums of both steps."""

    def __init__(self, first: ScanState, second: ScanState) -> None:
        super().__init__(first.clock, first.max_len)
        self.first, self.second = first, second

    def parts(self) -> Sequence[DecodingState]:
        """Both."""
        return self.first, self.second


class Luna(SequenceMixer):
    """Pack: Y = softmax(P Kᵀ/√D) K, with K of the tokens. Unpack: softmax(Q Mᵀ/√D) M, with M of Y.

    Keys and values of a step are one projection, as in the authors' code, so the layer has 4·C² weights, and
    l·C of P. P are the queries of the pack: each layer learns its own, because the interface carries
    nothing from layer to layer. The paper passes Y to the next layer as its P, so that only the first P is
    learnt and each layer has a projection of it; here that projection is part of P.

    Causal form: at token t the pack has the weights w_s = ω(P k_s/√D) of the tokens s ≤ t in place of
    softmax, with means over them, and M is of the tokens: a_t = softmax_l(1/t Σ_s (q_t·m_s) w_s /√D), and the
    output is 1/t Σ_s (a_t·w_s) m_s. Both are running sums.

    Deviations from the paper: positions are rotary, by a rotation of the keys of the pack, with P at 0; the
    paper adds vectors to the inputs of the network. Projections have no biases, and the packed sequence
    has no normalisation or feed-forward layer.
    """

    Config = LunaConfig
    config: LunaConfig
    position_scheme = "rotary"
    info = Info(
        paper="Ma et al. 2021, Luna: Linear Unified Nested Attention, arXiv:2106.01540",
        family="low rank",
        complexity=Complexity(time=1, memory=1, formula="T·l·C", source="Ma 2021, abstract", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    flop_overhead_reason = FLOP_OVERHEAD

    def __init__(self, config: LunaConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        if dims.inner_dim != dims.d_model:
            raise ValueError(self._uneven(dims))
        width = dims.d_model
        self.packed_queries = nn.Parameter(torch.randn(dims.heads, config.length, dims.head_dim))  # P
        self.query = nn.Linear(width, width, bias=False)
        self.pack = nn.Linear(width, width, bias=False)
        self.unpack = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    @staticmethod
    def _uneven(dims: Dims) -> str:
        return (
            f"head_size={dims.head_size}: the heads have {dims.inner_dim} channels; "
            f"the packed sequence needs the d_model={dims.d_model} of the tokens"
        )

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """The heads must have the channels of the tokens, because both steps project the same channels."""
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        return cls._uneven(dims) if dims.inner_dim != dims.d_model else None

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, H, D)."""
        heads: Tensor = x.unflatten(-1, (self.dims.heads, -1))
        return heads

    def _weights(self, keys: Tensor) -> Tensor:
        """w of keys (B, H, T, D): (B, H, T, l), float32 or wider."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        scores = keys.to(wide) @ (self.packed_queries.to(wide) * self.dims.head_dim**-0.5).mT
        return F.elu(scores) + 1 if self.config.activation == "elu" else F.softplus(scores)

    def _tokens(self, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, w and m of the causal form, (B, H, T, ·); `keys` (B, T, H, D) are rotated."""
        q, m = (self._heads(layer(x)).transpose(1, 2) for layer in (self.query, self.unpack))
        with torch.autocast(x.device.type, enabled=False):
            return q * self.dims.head_dim**-0.5, self._weights(keys.transpose(1, 2)), m

    def _merge(self, y: Tensor) -> Tensor:
        """(B, H, T, D) → (B, T, C), by the output projection."""
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    @staticmethod
    def _mean(sums: Tensor, before: int = 0) -> Tensor:
        """Divide sums (B, H, T, ·) by the number of tokens in them."""
        count = torch.arange(before + 1, before + sums.shape[2] + 1, device=sums.device, dtype=sums.dtype)
        return sums / count[:, None]

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        values = self._heads(self.pack(x))
        keys = rotary(values, ctx.positions, self.dims.rotary_base)
        if not ctx.causal:
            p = self.packed_queries.to(keys.dtype).expand(len(x), -1, -1, -1)
            packed = F.scaled_dot_product_attention(p, keys.transpose(1, 2), values.transpose(1, 2))
            m = self._heads(self.unpack(packed.transpose(1, 2).flatten(2))).transpose(1, 2)  # (B, H, l, D)
            q = self._heads(self.query(x)).transpose(1, 2)
            return MixerOut(self._merge(F.scaled_dot_product_attention(q, m, m)))
        q, w, m = self._tokens(x, keys)
        with torch.autocast(x.device.type, enabled=False):  # sums need float32
            chunk, device_type = self.config.chunk, self.device_type
            scores = gated_scan(q, m, w, features=Identity(), chunk=chunk, device_type=device_type)
            a = self._mean(scores).softmax(-1)
            y = gated_scan(a, w, m, features=Identity(), chunk=chunk, device_type=device_type)
            y = self._mean(y)
        return MixerOut(self._merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Both steps written out. The causal sums are masked matrices of pairs."""
        root = self.dims.head_dim**0.5
        values = self._heads(self.pack(x))
        keys = rotary(values, ctx.positions, self.dims.rotary_base)
        scores = torch.einsum("hld,bthd->bhlt", self.packed_queries, keys) / root
        q = self._heads(self.query(x))
        if not ctx.causal:
            packed = torch.einsum("bhlt,bthd->blhd", scores.softmax(-1), values)
            m = self._heads(self.unpack(packed.flatten(2)))
            a = (torch.einsum("bthd,blhd->bhtl", q, m) / root).softmax(-1)
            return self._merge(torch.einsum("bhtl,blhd->bhtd", a, m))
        m = self._heads(self.unpack(x))
        w = F.elu(scores) + 1 if self.config.activation == "elu" else scores.exp().log1p()
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        pairs = torch.einsum("bthd,bshd->bhts", q, m).tril() / root
        a = (torch.einsum("bhts,bhls->bhtl", pairs, w) / count).softmax(-1)
        pairs = torch.einsum("bhtl,bhls->bhts", a, w).tril()
        return self._merge(torch.einsum("bhts,bshd->bhtd", pairs, m) / count)

    def _shapes(self, batch_size: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Of the sums of both steps."""
        heads, head_dim, length = self.dims.heads, self.dims.head_dim, self.config.length
        return (batch_size, heads, head_dim, length), (batch_size, heads, length, head_dim)

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> LunaState:
        """The causal sums."""
        device = self.out.weight.device
        first, second = (
            ScanState(clock, max_len, shape, normalise=False, dtype=dtype, device=device)
            for shape in self._shapes(batch_size)
        )
        return LunaState(first, second)

    def step(self, x: Tensor, state: LunaState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        keys = rotary_next(self._heads(self.pack(x)), state.clock, self.dims.rotary_base)
        q, w, m = self._tokens(x, keys)
        before, chunk, device_type = state.clock.position, self.config.chunk, self.device_type
        with torch.autocast(x.device.type, enabled=False):
            scores = state.first.read_next(q, m, w, features=Identity(), chunk=chunk, device_type=device_type)
            a = self._mean(scores, before).softmax(-1)
            y = state.second.read_next(a, w, m, features=Identity(), chunk=chunk, device_type=device_type)
            y = self._mean(y, before)
        return self._merge(y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow."""
        return sum(
            ScanState.bytes(shape, normalise=False, element_bytes=work.element_bytes)
            for shape in self._shapes(work.batch_size)
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums of both steps of the causal form."""
        return 8 * work.batch_size * work.d_model * self.config.length

    def cost(self, work: Workload) -> Cost:
        """Projections, the pack and the unpack. If causal, the weights of the pack, and both running sums."""
        b, t, length, d = work.batch_size, work.seq_len, self.config.length, work.head_dim
        tokenwise = 2 * b * work.d_model**2
        if not work.causal:
            pairs = b * work.heads * t * length
            return Cost(
                {"projections": tokenwise * (3 * t + length), "pack": 4 * pairs * d, "unpack": 4 * pairs * d}
            )
        sequences, chunk = b * work.heads, self.config.chunk
        return Cost(
            {
                "projections": tokenwise * 4 * t,
                "pack": sequences * (2 * t * length * d + scan_flops(t, d, length, chunk=chunk)),
                "unpack": sequences * scan_flops(t, length, d, chunk=chunk),
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All tokens or, if causal, those up to the query; they are read through the packed sequence."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
