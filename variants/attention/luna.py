"""Luna: attention in two steps through a packed sequence of fixed length (Ma 2021, arXiv:2106.01540).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, l packed length.
"""

from __future__ import annotations

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
from variants.ops.patterns import masks
from variants.ops.projections import rotary, rotary_next
from variants.ops.recurrences.gated_scan import FLOP_OVERHEAD
from variants.ops.recurrences.packed_sums import Plan, packed_flops, packed_sums, read_segments


@dataclass(frozen=True, kw_only=True)
class LunaConfig(VariantConfig):
    """Knobs of the packed sequence and of the causal sums."""

    length: int = knob(64, least=1, unit="positions")
    """Length of the packed sequence, which every token reads."""
    activation: Literal["elu", "softplus"] = "elu"
    """Weights of the causal pack, in place of softmax: elu(s) + 1, or log(1 + exp(s))."""
    chunk: int = knob(32, least=1, unit="tokens")
    """Tokens of a chunk, at most. Causal sums are computed pair by pair within it; earlier chunks are one
    sum. It changes the cost, and not the outputs."""


class LunaState(DecodingState):
    """The sum of packed tokens S (B, H, l, D) of one layer, in float32 or wider."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        wide = torch.promote_types(dtype, torch.float32)
        self.sums = torch.zeros(shape, dtype=wide, device=device)


class Luna(SequenceMixer):
    """Pack: Y = softmax(P Kᵀ/√D) K, with K of the tokens. Unpack: softmax(Q Mᵀ/√D) M, with M of Y.

    Keys and values of a step are one projection, as in the authors' code, so the layer has 4·C² weights, and
    l·C of P. P are the queries of the pack: each layer learns its own, because the interface carries
    nothing from layer to layer. The paper passes Y to the next layer as its P, so that only the first P is
    learnt and each layer has a projection of it; here that projection is part of P.

    Causal form: at token t the pack has the weights w_s = ω(P k_s/√D) of the tokens s ≤ t in place of
    softmax, with means over them, and M is of the tokens: a_t = softmax_l(1/t Σ_s (q_t·m_s) w_s /√D), and the
    output is 1/t Σ_s (a_t·w_s) m_s. Both read the running sum Σ_s w_s m_sᵀ.

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
            y = packed_sums(q, w, m, chunk=self.config.chunk, device_type=self.device_type)
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

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> LunaState:
        """The causal sum."""
        shape = batch_size, self.dims.heads, self.config.length, self.dims.head_dim
        return LunaState(clock, max_len, shape, dtype, self.out.weight.device)

    def step(self, x: Tensor, state: LunaState) -> Tensor:
        """(B, n, C) → (B, n, C)."""
        keys = rotary_next(self._heads(self.pack(x)), state.clock, self.dims.rotary_base)
        q, w, m = self._tokens(x, keys)
        with torch.autocast(x.device.type, enabled=False):
            plan = Plan.make(w, m, self.config.chunk, self.device_type)
            sums = state.sums.flatten(0, 1)  # (B·H, l, D), a view
            y, _, states = read_segments(plan, q, w, m, sums, state.clock.position)
            sums.copy_(states[-1])
        return self._merge(y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sum does not grow."""
        return max(4, work.element_bytes) * work.batch_size * work.d_model * self.config.length

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sum of the causal form."""
        return 4 * work.batch_size * work.d_model * self.config.length

    def cost(self, work: Workload) -> Cost:
        """Projections, pack and unpack. If causal, weights of the pack, and the sum with both reads."""
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
                "weights": sequences * 2 * t * length * d,
                "sums": sequences * packed_flops(t, length, d, chunk=chunk),
            }
        )

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All tokens or, if causal, those up to the query; they are read through the packed sequence."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
