"""Linformer: attention over k linear combinations of the positions (Wang 2020, arXiv:2006.04768, §4).

Shapes: B batch, T tokens, C channels, H heads, K heads of keys, D channels of a head, k projected length, L
maximum length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
from variants.ops.patterns import masks
from variants.ops.projections import Projections, masked_attention


@dataclass(frozen=True, kw_only=True)
class LinformerConfig(VariantConfig):
    """Knobs of the projection along the length."""

    k: int = knob(256, least=1, unit="positions")
    """Projected keys and values that every query reads; at most the maximum sequence length."""
    sharing: Literal["none", "headwise", "kv", "layerwise"] = "kv"
    """Sharing of the length projections E (keys) and F (values) (§4). none: each head of each layer has its
    own E and F. headwise: the heads of a layer share E and F. kv: also E = F. layerwise: also all layers
    share them (see `Linformer.tie`)."""


class Linformer(SequenceMixer):
    """softmax(Q(EK)ᵀ/√D)(FV), where E and F are learned (k, L) matrices that combine the positions.

    A sequence of T < L tokens uses the first T columns of E and F; a longer sequence raises ValueError.

    Deviations from the paper: positions are rotary, and are applied to the keys before the projection, so a
    projected key contains the angles of all positions in it. E and F are initialised with a standard
    deviation of 1/√L, which preserves the size of the keys; the proofs in §3 assume 1/√k. All layers and
    heads have the same k. E and F are always linear maps, not pooling or convolution.
    """

    Config = LinformerConfig
    config: LinformerConfig
    position_scheme = "rotary"
    info = Info(
        paper="Wang et al. 2020, Linformer, arXiv:2006.04768",
        family="low rank",
        complexity=Complexity(time=1, memory=1, formula="T·k", source="Wang 2020, Table 1 and §4", survey=1),
        caps=Caps(causal=False, bidirectional=True, fixed_length=True),
    )

    no_shared_keys: ClassVar[str | None] = None

    def __init__(self, config: LinformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        heads = (dims.key_heads,) if config.sharing == "none" else ()
        self.key_mixture = self._draw(*heads, config.k, dims.seq_len)  # E, (H, k, L) or (k, L)
        apart = config.sharing in ("none", "headwise")
        self.value_mixture = self._draw(*heads, config.k, dims.seq_len) if apart else self.key_mixture  # F

    @staticmethod
    def _draw(*shape: int) -> nn.Parameter:
        weights = torch.randn(shape, dtype=torch.float32) * shape[-1] ** -0.5
        return nn.Parameter(weights.to(torch.get_default_dtype()))

    @classmethod
    def tie(cls, layers: Sequence[SequenceMixer]) -> None:
        """With sharing=layerwise, replace the length projections of all layers by that of the lowest layer.

        Called once by the model, because a layer does not know the other layers when it is built.
        """
        linformers = [layer for layer in layers if isinstance(layer, cls)]
        for layer in linformers:
            if layer.config.sharing == "layerwise":
                layer.key_mixture = layer.value_mixture = linformers[0].key_mixture

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: every projected key and value mixes all positions, later ones too"
        return super().no_form(config, causal=causal)

    @classmethod
    def unsupported(cls, config: VariantConfig, dims: Dims, *, causal: bool) -> str | None:
        """k must not exceed the maximum sequence length."""
        assert isinstance(config, LinformerConfig)
        if reason := super().unsupported(config, dims, causal=causal):
            return reason
        if config.k > dims.seq_len:
            return f"k={config.k}: larger than the maximum sequence length; allowed is 1 to {dims.seq_len}"
        return None

    def _columns(self, mixture: Tensor, seq_len: int) -> Tensor:
        """The columns of E or F for the first `seq_len` positions: (…, k, T)."""
        longest = mixture.shape[-1]
        if seq_len > longest:
            raise ValueError(
                f"{seq_len} tokens: the length projection was built for at most {longest}; "
                "build the layer with a longer dims.seq_len"
            )
        # no slice at full length, because its backward would allocate a second gradient
        return mixture if seq_len == longest else mixture[..., :seq_len]

    def _mix(self, mixture: Tensor, x: Tensor) -> Tensor:
        """Keys or values (B, K, T, D) → (B, K, k, D)."""
        columns = self._columns(mixture, x.shape[2])
        if columns.dim() == 3:
            return columns @ x
        # all heads share the matrix, so this is one product over all channels, on a view of the projections
        merged = columns @ x.transpose(1, 2).flatten(2)  # (B, k, C)
        mixed: Tensor = merged.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)
        return mixed

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state. Raises ValueError where T > L."""
        q, k, v = self.projections.split_shared(x, ctx.positions)
        mixed = self._mix(self.key_mixture, k), self._mix(self.value_mixture, v)
        k, v = map(self.projections.spread, mixed)
        return MixerOut(self.projections.merge(F.scaled_dot_product_attention(q, k, v)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Project the keys and values of each head along the length, then dense attention to them."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split_shared(x, ctx.positions)
        e, f = (
            self._columns(mixture, x.shape[1]).expand(self.dims.key_heads, -1, -1)  # (K, k, T)
            for mixture in (self.key_mixture, self.value_mixture)
        )
        k = torch.einsum("hkt,bhtd->bhkd", e, k)
        v = torch.einsum("hkt,bhtd->bhkd", f, v)
        k, v = self.projections.spread(k), self.projections.spread(v)
        allowed = torch.ones(x.shape[1], self.config.k, dtype=torch.bool)
        return self.projections.merge(masked_attention(q, k, v, allowed))

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor:
        """Softmax attention to the keys and values without the length projection."""
        q, k, v = self.projections.split(x, ctx.positions)
        return self.projections.merge(
            masked_attention(q, k, v, self.attention_mask(x.shape[1], causal=ctx.causal))
        )

    def cost(self, work: Workload) -> Cost:
        """Length projections of keys and values, each 2·K·D, scores and weighted sum, each 2·H·D, for T·k
        pairs."""
        t = work.seq_len
        return Cost(
            {
                "projections": Projections.flops(work),
                "attention": 4 * work.batch_size * (work.inner_dim + work.key_dim) * t * self.config.k,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the k projected keys and values: sums over tokens, to which a next token can be added."""
        return 2 * work.batch_size * self.config.k * work.key_dim * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys; they are read through k linear combinations."""
        return masks.matrix(masks.all_keys, seq_len)
