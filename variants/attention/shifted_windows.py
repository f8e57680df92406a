"""Shifted windows in one dimension (Swin Transformer, Liu 2021, arXiv:2103.14030, §3.2).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from variants.base import Caps, Complexity, Dims, Info, VariantConfig
from variants.knobs import knob
from variants.ops.patterns.masked_attention import MaskedAttention, MaskedConfig
from variants.ops.patterns.masks import Rule
from variants.ops.patterns.regions import Region
from variants.ops.patterns.strided_parts import Part, StridedTokens


@dataclass(frozen=True, kw_only=True)
class ShiftedWindowsConfig(MaskedConfig):
    """Knobs of the windows."""

    window: int = knob(256, least=1, unit="tokens")
    """Tokens of a window. Tokens read each other within it; in odd layers the windows are shifted by half of
    it."""


@dataclass(frozen=True)
class SameWindow(Rule):
    """Keys in the same window of `length` tokens as the query; one window starts at `shift`."""

    length: int
    shift: int

    @property
    def period(self) -> int:
        """The length of a window."""
        return self.length

    @property
    def reach(self) -> int:
        """The distance between the ends of a window."""
        return self.length - 1

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """⌊(i − shift) / length⌋ = ⌊(j − shift) / length⌋."""
        return (i - self.shift) // self.length == (j - self.shift) // self.length


class ShiftedWindows(MaskedAttention):
    """Softmax attention within windows that do not overlap; odd layers shift them by half a window.

    A window and the next one exchange information only by the shift, so the tokens that an output depends on
    extend by half a window with each layer. The paper shifts a grid cyclically and masks pairs that are not
    neighbours in the image. In one dimension, there is nothing to mask: the windows at both ends are shorter.
    In a causal model, a cyclic shift without that mask would let the first tokens read the last ones.

    Deviations: one dimension, and no merging of patches. Positions are rotary, as in every variant of this
    project, where the paper adds a learnt bias for each distance. Windows are causal in causal models; the
    paper has bidirectional ones only.
    """

    Config = ShiftedWindowsConfig
    config: ShiftedWindowsConfig
    info = Info(
        paper="Liu et al. 2021, Swin Transformer, arXiv:2103.14030",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·w", source="Liu 2021, §3.2, eq. 2"),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: VariantConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.shift = self.config.window // 2 if layer % 2 else 0

    def rule(self, seq_len: int, *, causal: bool) -> Rule:
        """The windows of this layer."""
        return SameWindow(self.config.window, self.shift)

    def regions(self, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        """The windows after the first, shorter one, so that tiles begin where windows do."""
        rule = self.mask(seq_len, causal=causal)
        return (Region(rule=rule, first=self.shift, heads=(0, self.dims.heads)),)

    def parts(self, seq_len: int, *, causal: bool, device: torch.device) -> list[Part]:
        """The windows of the region, and the first one."""
        parts = super().parts(seq_len, causal=causal, device=device)
        if self.shift:
            first = StridedTokens(start=0, run=min(self.shift, seq_len))
            parts.append(Part(heads=(0, self.dims.heads), queries=first, keys=first, causal=causal))
        return parts

    def pairs(self, seq_len: int, *, causal: bool) -> int:
        """The pairs of the windows of the region, and of the first one."""
        first = min(self.shift, seq_len)
        in_first = first * (first + 1) // 2 if causal else first * first
        return super().pairs(seq_len, causal=causal) + self.dims.heads * in_first

    def carried(self, seq_len: int) -> int:
        """The keys of the window that has not ended."""
        after = seq_len - self.shift
        return self.dims.key_heads * (seq_len if after < 0 else after % self.config.window)
