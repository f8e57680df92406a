"""What the two patterns of Sparse Transformers share (Child 2019, arXiv:1904.10509).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from variants.base import Caps, Complexity, Context, Cost, Dims, Info, MixerOut, VariantConfig, Workload
from variants.knobs import knob
from variants.ops import backends, masks
from variants.ops.block_sparse import UnionAttention, UnionConfig
from variants.ops.projections import Projections, masked_attention
from variants.ops.strided_parts import Part


@dataclass(frozen=True, kw_only=True)
class SparseConfig(UnionConfig):
    """Knobs of both patterns."""

    impl: Literal["auto", "fused", "plain", "flex"] = "auto"  # type: ignore[assignment]  # one more
    """Implementation of the parts. fused: torch's CPU attention kernel, part by part. plain: matrix products,
    on any device. auto: fused on the CPU, plain elsewhere. flex: FlexAttention, compiled, on CUDA; hardly a
    tile of 128 × 128 is empty in these patterns, so it computes nearly all pairs of dense attention."""
    stride: int | None = knob(None, least=1, unit="tokens")
    """Stride l; null: the power of two nearest to √T. T is the longest sequence that the layer is built for
    (not the one it is fed: a prefix must be read as it is within the whole)."""
    head_mode: Literal["merged", "split", "interleaved"] = "merged"
    """Which head reads which factor. merged: each head reads the union of both factors (eq. 7), the one mode
    that the paper's experiments name (§7.2). split: the first half of the heads reads the near factor, the
    rest the far one (eq. 8). interleaved: even layers read the near factor, odd ones the far one (eq. 6)."""

    def stride_for(self, seq_len: int) -> int:
        """The stride of a layer built for sequences up to seq_len."""
        return self.stride or 1 << math.floor(math.log2(seq_len) / 2 + 0.5)


@dataclass(frozen=True, kw_only=True)
class Role:
    """What heads [first, last) of a layer read: "near", "far" or "merged"."""

    factor: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What the heads of a layer read, as one rule (head, query index, key index) → bool."""

    variant: type[SparseAttention]
    config: SparseConfig
    stride: int
    roles: tuple[Role, ...]
    seq_len: int
    causal: bool

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Broadcast over all three."""
        first, *rest = self.roles
        allowed = self.variant.rule(self, first, head)(i, j)
        for role in rest:
            allowed = torch.where(head < role.first, allowed, self.variant.rule(self, role, head)(i, j))
        return allowed & masks.causal(i, j) if self.causal else allowed


class SparseAttention(UnionAttention):
    """Base of both patterns: which heads read which factor, and the bookkeeping.

    Positions are rotary, as for every variant here; the paper adds learnt embeddings of the row and
    the column of a token in a matrix of width l (§5.3).
    """

    config: SparseConfig
    info = Info(
        paper="Child et al. 2019, Sparse Transformers, arXiv:1904.10509",
        family="fixed patterns",
        complexity=Complexity(
            time=1.5, memory=1.5, formula="T·√T", source="Child 2019, abstract and §4.2", survey=1.5
        ),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: SparseConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        self.stride = config.stride_for(dims.seq_len)
        heads, half = dims.heads, dims.heads // 2
        if config.head_mode == "split":
            near, far = Role(factor="near", first=0, last=half), Role(factor="far", first=half, last=heads)
            self.roles: tuple[Role, ...] = (near, far)
        elif config.head_mode == "interleaved":
            self.roles = (Role(factor="far" if layer % 2 else "near", first=0, last=heads),)
        else:
            self.roles = (Role(factor="merged", first=0, last=heads),)
        if config.impl == "flex":
            self.flop_overhead_reason, self.overhead_is_bounded = backends.FLEX_PADDING, False

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Splitting needs two heads."""
        assert isinstance(config, SparseConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.head_mode == "split" and dims.heads < 2:
            return f"heads={dims.heads}: head_mode=split needs at least 2"
        return None

    @classmethod
    def missing(
        cls, config: VariantConfig, dims: Dims, *, device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """FlexAttention where it has no backward pass, the fused kernel away from the CPU."""
        assert isinstance(config, SparseConfig)
        if config.impl == "flex":
            return backends.missing_flex(device, dims.head_dim)
        return super().missing(config, dims, device=device, dtype=dtype)

    @abstractmethod
    def parts(self, seq_len: int, role: Role, *, causal: bool, device: torch.device) -> list[Part]:
        """The pairs that a role's heads read, each in exactly one part."""

    @staticmethod
    @abstractmethod
    def rule(layer: Reads, role: Role, head: Tensor) -> masks.Rule:
        """What heads of a role read, as a pure rule; causality is added to it."""

    @abstractmethod
    def pairs(self, seq_len: int, role: Role, head: int, *, causal: bool) -> int:
        """How many pairs that is, in closed form."""

    @abstractmethod
    def carried(self, seq_len: int, role: Role, head: int) -> int:
        """Tokens whose keys and values a head of a causal model can still read after seq_len tokens."""

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        if self.config.impl == "flex":
            y = backends.flex(q, k, v, self.reads(x.shape[1], causal=ctx.causal))
            return MixerOut(self.projections.merge(y))
        parts = [
            part
            for role in self.roles
            for part in self.parts(x.shape[1], role, causal=ctx.causal, device=x.device)
        ]
        return MixerOut(self.projections.merge(self.attend(q, k, v, parts)))

    def reads(self, seq_len: int, *, causal: bool) -> Reads:
        """The rule of all heads."""
        return Reads(
            variant=type(self),
            config=self.config,
            stride=self.stride,
            roles=self.roles,
            seq_len=seq_len,
            causal=causal,
        )

    def allowed(self, seq_len: int, *, causal: bool) -> Tensor:
        """(H, T, T) bool: which keys a query may read, head by head."""
        index = torch.arange(seq_len)
        head = torch.arange(self.dims.heads)[:, None, None]
        allowed = self.reads(seq_len, causal=causal)(head, index[:, None], index)
        return allowed.expand(self.dims.heads, seq_len, seq_len)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The oracle on each head's own pattern; a query with no key gets 0."""
        q, k, v = self.projections.split(x, ctx.positions)
        allowed = self.allowed(x.shape[1], causal=ctx.causal).to(x.device)
        some = allowed.any(-1, keepdim=True)
        return self.projections.merge(masked_attention(q, k, v, allowed | ~some) * some)

    def cost(self, work: Workload) -> Cost:
        """Scores and weighted sum: 4·D for each head's pairs."""
        pairs = sum(
            self.pairs(work.seq_len, role, h, causal=work.causal)
            for role in self.roles
            for h in range(role.first, role.last)
        )
        return Cost(
            {
                "projections": Projections.flops(work.batch_size, work.seq_len, work.d_model),
                "attention": 4 * work.batch_size * work.head_dim * pairs,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """The keys and values that later queries can still read, head by head."""
        tokens = sum(
            self.carried(work.seq_len, role, h) for role in self.roles for h in range(role.first, role.last)
        )
        return 2 * work.batch_size * tokens * work.head_dim * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """What any head may read."""
        return self.allowed(seq_len, causal=causal).any(dim=0)
