"""What the two patterns of Sparse Transformers share (Child 2019, arXiv:1904.10509).

Shapes: B batch, T tokens, C channels, H heads, D = C / H; l the stride.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from variants.base import Caps, Complexity, Dims, Info, VariantConfig
from variants.knobs import knob
from variants.ops.masked_attention import MaskedAttention, MaskedConfig
from variants.ops.masks import HeadSplit, Rule


@dataclass(frozen=True, kw_only=True)
class SparseConfig(MaskedConfig):
    """Knobs of both patterns."""

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


class SparseAttention(MaskedAttention):
    """Base of both patterns: which heads read which factor.

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
        self.stride = config.stride_for(dims.seq_len)
        heads, half = dims.heads, dims.heads // 2
        if config.head_mode == "split":
            near, far = Role(factor="near", first=0, last=half), Role(factor="far", first=half, last=heads)
            self.roles: tuple[Role, ...] = (near, far)
        elif config.head_mode == "interleaved":
            self.roles = (Role(factor="far" if layer % 2 else "near", first=0, last=heads),)
        else:
            self.roles = (Role(factor="merged", first=0, last=heads),)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """Splitting needs two heads."""
        assert isinstance(config, SparseConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.head_mode == "split" and dims.heads < 2:
            return f"heads={dims.heads}: head_mode=split needs at least 2"
        return None

    @abstractmethod
    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """What the heads of a role read."""

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """What the heads of each role read."""
        first, *rest = (self.role_rule(seq_len, role, causal=causal) for role in self.roles)
        return HeadSplit(self.roles[0].last, first, rest[0]) if rest else first
