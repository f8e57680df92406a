"""Base class of the two patterns of Sparse Transformers (Child 2019, arXiv:1904.10509).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head; l the stride.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from variants.base import Caps, Complexity, Dims, Impl, Info, VariantConfig
from variants.knobs import knob
from variants.ops.fused.flash import missing_flash
from variants.ops.fused.flash_union import Union, flash_union
from variants.ops.patterns.masked_attention import TILES, MaskedAttention
from variants.ops.patterns.masks import HeadSplit, Rule


@dataclass(frozen=True, kw_only=True)
class SparseConfig(VariantConfig):
    """Knobs of both patterns."""

    impl: Literal["auto", "fused", "plain", "dense", "flex", "flash"] = "auto"
    """Implementation of the mask. fused: tiles with allowed pairs, by torch's CPU attention kernel. plain:
    the same tiles by matrix products, on any device. dense: every score, masked. flex: FlexAttention,
    compiled, on CUDA. flash: a few calls of flash attention, merged by their logsumexp, on CUDA with float16
    or bfloat16; no device has run it yet. auto: fused on the CPU, plain elsewhere."""
    stride: int | None = knob(None, least=1, unit="tokens")
    """Stride l; null: the power of two nearest to √T. T is the maximum sequence length of the layer, not the
    length of the current input, because a prefix must be read in the same way as the full sequence."""
    head_mode: Literal["merged", "split", "interleaved"] = "merged"
    """Assignment of the two factors to heads. merged: each head reads the union of both factors (eq. 7), the
    only mode that the paper's experiments name (§7.2). split: the first half of the heads reads the local
    factor, the second half the long-range factor (eq. 8). interleaved: even layers read the local factor, odd
    layers the long-range factor (eq. 6)."""

    def stride_for(self, seq_len: int) -> int:
        """The stride of a layer with the maximum sequence length `seq_len`."""
        return self.stride or 1 << math.floor(math.log2(seq_len) / 2 + 0.5)


@dataclass(frozen=True, kw_only=True)
class Role:
    """The factor that heads [first, last) of a layer read: "local", "long_range" or "merged"."""

    factor: str
    first: int
    last: int


def flash(layer: SparseAttention, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """A few calls of flash attention for each role. Untried."""
    outputs = []
    for role in layer.roles:
        q_role, k_role, v_role = (t[:, role.first : role.last] for t in (q, k, v))
        union = layer.role_union(q_role, role, causal=causal)
        outputs.append(flash_union(q_role, k_role, v_role, union).transpose(1, 2))
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return y.transpose(1, 2)


class SparseAttention(MaskedAttention):
    """Base class of both patterns: assigns the factors to heads.

    Deviation: positions are rotary, as in every variant of this project. The paper adds learned embeddings of
    the row and the column of a token in a matrix of width l (§5.3).
    """

    config: SparseConfig
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        **TILES,
        "flash": Impl(run=flash, missing=missing_flash, has_shape_functions=True, untried=True),
    }
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
            local, long_range = (
                Role(factor="local", first=0, last=half),
                Role(factor="long_range", first=half, last=heads),
            )
            self.roles: tuple[Role, ...] = (local, long_range)
        elif config.head_mode == "interleaved":
            self.roles = (Role(factor="long_range" if layer % 2 else "local", first=0, last=heads),)
        else:
            self.roles = (Role(factor="merged", first=0, last=heads),)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """`head_mode=split` needs two heads."""
        assert isinstance(config, SparseConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.head_mode == "split" and dims.heads < 2:
            return f"heads={dims.heads}: head_mode=split needs at least 2"
        return None

    @abstractmethod
    def role_rule(self, seq_len: int, role: Role, *, causal: bool) -> Rule:
        """The rule of the heads of a role."""

    @abstractmethod
    def role_union(self, q: Tensor, role: Role, *, causal: bool) -> Union:
        """The calls of flash attention for the heads of a role, whose queries are q (B, H, T, D)."""

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The rule of each role for its heads."""
        first, *others = (self.role_rule(seq_len, role, causal=causal) for role in self.roles)
        return HeadSplit(self.roles[0].last, first, others[0]) if others else first
