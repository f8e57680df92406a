"""Longformer's sliding window (Beltagy 2020, arXiv:2004.05150, §3.1).

Shapes: B batch, T tokens, C channels, H heads, D = C / H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from variants import patterns
from variants.base import Attention, Caps, Complexity, Dims, Flops, Out, VariantConfig
from variants.layers import Projections, local_attention, masked_attention


@dataclass(frozen=True, kw_only=True)
class LongformerConfig(VariantConfig):
    """Knobs of the sliding window."""

    window: tuple[int, ...] = (256,)
    """Tokens a query reads on each side, itself included: of the lowest layer, the next, …; layers
    above the last entry use it again. The paper's two-sided w is 2·window − 1 here."""
    dilation: tuple[int, ...] = (1,)
    """Steps between neighbours in the window, one entry a head, repeated to the number of heads."""

    def __post_init__(self) -> None:
        self.require("window", bool(self.window) and min(self.window) >= 1, "one or more integers ≥ 1")
        self.require("dilation", bool(self.dilation) and min(self.dilation) >= 1, "one or more integers ≥ 1")


class Longformer(Attention):
    """Softmax attention within a sliding window, one-sided where causal.

    Windows may grow by layer and be dilated by head (§3.1, §4.1). Positions are rotary, as for every
    variant here; the paper's language models use Transformer-XL's.
    """

    Config = LongformerConfig
    config: LongformerConfig
    caps = Caps(causal=True, bidirectional=True)
    paper = "Beltagy et al. 2020, Longformer, arXiv:2004.05150"
    complexity = Complexity(time=1, memory=1, formula="T·w", source="Beltagy 2020, §3.1")
    padding = "a block of queries is given every key that any of them reads, and masks the rest"

    def __init__(self, config: LongformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        self.window = config.window[min(layer, len(config.window) - 1)]
        self.dilations = tuple(config.dilation[h % len(config.dilation)] for h in range(dims.heads))

    def forward(self, x: Tensor, *, causal: bool, state: Any = None) -> Out:
        """(B, T, C) → Out; carries no state."""
        q, k, v = self.projections.split(x)
        kinds = sorted(set(self.dilations))
        if len(kinds) == 1:
            return Out(self.projections.merge(self._dilated(q, k, v, kinds[0], causal)))
        y = torch.empty_like(q)
        for dilation in kinds:
            heads = [h for h, d in enumerate(self.dilations) if d == dilation]
            y[:, heads] = self._dilated(q[:, heads], k[:, heads], v[:, heads], dilation, causal)
        return Out(self.projections.merge(y))

    def _dilated(self, q: Tensor, k: Tensor, v: Tensor, dilation: int, causal: bool) -> Tensor:
        """A window with dilation d is a plain window on each of the d interleaved subsequences."""
        if dilation == 1:
            return local_attention(q, k, v, window=self.window, causal=causal)
        y = torch.empty_like(q)
        for r in range(min(dilation, q.shape[2])):
            q_r, k_r, v_r = (t[:, :, r::dilation] for t in (q, k, v))
            y[:, :, r::dilation] = local_attention(q_r, k_r, v_r, window=self.window, causal=causal)
        return y

    def _allowed(self, seq_len: int, causal: bool) -> Tensor:
        """(H, T, T) bool."""
        rules = [patterns.window(self.window, dilation) for dilation in self.dilations]
        if causal:
            rules = [patterns.both(rule, patterns.causal) for rule in rules]
        return torch.stack([patterns.matrix(rule, seq_len) for rule in rules])

    def reference(self, x: Tensor, *, causal: bool) -> Tensor:
        """The oracle on each head's own window."""
        q, k, v = self.projections.split(x)
        return self.projections.merge(masked_attention(q, k, v, self._allowed(x.shape[1], causal)))

    def flops(self, dims: Dims, *, causal: bool) -> Flops:
        """Scores and weighted sum: 4·D for each head's pairs."""
        t = dims.seq_len
        pairs = 0
        for d in self.dilations:
            subsequences = [(t - r + d - 1) // d for r in range(min(d, t))]
            pairs += sum(patterns.window_pairs(n, self.window, is_causal=causal) for n in subsequences)
        return Flops(
            Projections.flops(dims.batch_size, t, dims.d_model),
            4 * dims.batch_size * dims.head_dim * pairs,
        )

    def state_bytes(self, dims: Dims) -> int:
        """The keys and values that a later query can still read, head by head."""
        tokens = sum(min(dims.seq_len, (self.window - 1) * d) for d in self.dilations)
        return 2 * dims.batch_size * tokens * dims.head_dim * dims.element_bytes

    def pattern(self, seq_len: int, *, causal: bool) -> Tensor:
        """What any head may read."""
        return self._allowed(seq_len, causal).any(dim=0)
