"""Linformer: attention over k mixtures of the positions (Wang 2020, arXiv:2006.04768, §4).

Shapes: B batch, T tokens, C channels, H heads, D = C / H, k projected length, L longest sequence.
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
    Complexity,
    Context,
    Cost,
    Dims,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops import masks
from variants.ops.projections import Projections, masked_attention


@dataclass(frozen=True, kw_only=True)
class LinformerConfig(VariantConfig):
    """Knobs of the projection along the length."""

    k: int = knob(256, least=1, unit="positions")
    """Projected keys and values that every query reads; at most the longest sequence, in positions."""
    sharing: Literal["none", "headwise", "kv", "layerwise"] = "kv"
    """Which length projections are one and the same (§4). none: each head of each layer has one for
    its keys (E) and one for its values (F). headwise: a layer's heads share E and F. kv: also E = F.
    layerwise: also all layers, once `Linformer.tie` has been given them."""


class Linformer(SequenceMixer):
    """softmax(Q(EK)ᵀ/√D)(FV), where E and F are learnt (k, L) matrices that mix the positions.

    A sequence of T < L tokens is read with the first T columns of E and F; a longer one is refused.
    Deviations from the paper: positions are rotary, applied to the keys before they are mixed, so a
    projected key carries the angles of all the positions in it; E and F start at a standard deviation
    of 1/√L, which keeps the keys' size, where §3's proofs assume 1/√k; one k serves all layers and
    heads, and E and F are always linear maps, not pooling or convolution.
    """

    Config = LinformerConfig
    config: LinformerConfig
    info = Info(
        paper="Wang et al. 2020, Linformer, arXiv:2006.04768",
        family="low rank",
        complexity=Complexity(time=1, memory=1, formula="T·k", source="Wang 2020, Table 1 and §4", survey=1),
        caps=Caps(causal=False, bidirectional=True, fixed_length=True),
    )

    def __init__(self, config: LinformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims.d_model, dims.heads)
        heads = (dims.heads,) if config.sharing == "none" else ()
        self.key_mixture = self._draw(*heads, config.k, dims.seq_len)  # E, (H, k, L) or (k, L)
        apart = config.sharing in ("none", "headwise")
        self.value_mixture = self._draw(*heads, config.k, dims.seq_len) if apart else self.key_mixture  # F

    @staticmethod
    def _draw(*shape: int) -> nn.Parameter:
        weights = torch.randn(shape, dtype=torch.float32) * shape[-1] ** -0.5
        return nn.Parameter(weights.to(torch.get_default_dtype()))

    @classmethod
    def tie(cls, layers: Sequence[SequenceMixer]) -> None:
        """Give all layers of a network the lowest layer's mixture, where sharing=layerwise asks for it.

        A layer cannot see the others when it is built, so whoever builds them all calls this once.
        """
        linformers = [layer for layer in layers if isinstance(layer, cls)]
        for layer in linformers:
            if layer.config.sharing == "layerwise":
                layer.key_mixture = layer.value_mixture = linformers[0].key_mixture

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """A causal one."""
        if causal:
            return "has no causal form: every projected key and value mixes all positions, later ones too"
        return super().no_form(config, causal=causal)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """A k that would lengthen the sequence."""
        assert isinstance(config, LinformerConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.k > dims.seq_len:
            return f"k={config.k}: projects to more positions than there are; allowed is 1 to {dims.seq_len}"
        return None

    def _columns(self, mixture: Tensor, seq_len: int) -> Tensor:
        """The columns of E or F for the first `seq_len` positions: (…, k, T)."""
        longest = mixture.shape[-1]
        if seq_len > longest:
            raise ValueError(
                f"{seq_len} tokens: the length projection was built for at most {longest}; "
                "build the layer with a longer dims.seq_len"
            )
        # at full length no slice: its backward would fill a second gradient with zeros
        return mixture if seq_len == longest else mixture[..., :seq_len]

    def _mix(self, mixture: Tensor, x: Tensor) -> Tensor:
        """Keys or values (B, H, T, D) → (B, H, k, D)."""
        columns = self._columns(mixture, x.shape[2])
        if columns.dim() == 3:
            return columns @ x
        # one matrix for all heads: a single product over all channels, on a view of the projections
        merged = columns @ x.transpose(1, 2).flatten(2)  # (B, k, C)
        mixed: Tensor = merged.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return mixed

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where T > L."""
        q, k, v = self.projections.split(x, ctx.positions)
        k, v = self._mix(self.key_mixture, k), self._mix(self.value_mixture, v)
        return MixerOut(self.projections.merge(F.scaled_dot_product_attention(q, k, v)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Mix every head's keys and values, then dense attention to all mixtures."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        e, f = (
            self._columns(mixture, x.shape[1]).expand(q.shape[1], -1, -1)  # (H, k, T)
            for mixture in (self.key_mixture, self.value_mixture)
        )
        k = torch.einsum("hkt,bhtd->bhkd", e, k)
        v = torch.einsum("hkt,bhtd->bhkd", f, v)
        everything = torch.ones(x.shape[1], self.config.k, dtype=torch.bool)
        return self.projections.merge(masked_attention(q, k, v, everything))

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor:
        """The keys and values as they are, unmixed."""
        q, k, v = self.projections.split(x, ctx.positions)
        return self.projections.merge(
            masked_attention(q, k, v, self.attention_mask(x.shape[1], causal=ctx.causal))
        )

    def cost(self, work: Workload) -> Cost:
        """Mixing keys and values, scores and weighted sum: each 2·C for T·k pairs."""
        t = work.seq_len
        return Cost(
            {
                "projections": Projections.flops(work.batch_size, t, work.d_model),
                "attention": 8 * work.batch_size * work.d_model * t * self.config.k,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """The k mixed keys and values: sums over the tokens, to which a next one could be added."""
        return 2 * work.batch_size * self.config.k * work.d_model * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """Everything, though only through k mixtures."""
        return masks.matrix(masks.anything, seq_len)
