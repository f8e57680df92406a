"""Performer: softmax attention estimated by random features (Choromanski 2020, arXiv:2009.14794).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, m features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from variants.base import (
    Caps,
    Clock,
    Complexity,
    Context,
    Cost,
    Dims,
    Impl,
    Info,
    MixerOut,
    SequenceMixer,
    VariantConfig,
    Workload,
)
from variants.knobs import knob
from variants.ops.features.causal_linear_attention import causal_favor
from variants.ops.features.feature_state import FeatureState
from variants.ops.features.linear_attention import full_favor
from variants.ops.features.positive_features import RELU_FLOOR
from variants.ops.features.scaled_linear_attention import chunked_favor
from variants.ops.patterns import masks
from variants.ops.projections import Projections, masked_attention
from variants.ops.recurrences.fla_products import CHUNKS, fla_favor, missing_fla


@dataclass(frozen=True, kw_only=True)
class PerformerConfig(VariantConfig):
    """Knobs of the random features and of their sums."""

    features: Literal["softmax", "relu"] = "softmax"
    """Feature map of queries and keys. softmax: exp(ω·x − |x|²/2), whose products are an unbiased estimate of
    the weights of softmax (Lemma 1). relu: max(ω·x, 0) + 0.001, which does not estimate softmax (§4.3,
    "Performer-ReLU")."""
    n_features: int = knob(256, least=1, unit="directions")
    """Number of directions ω, which is the number of features. All heads of a layer share the directions."""
    orthogonal: bool = True
    """Draw orthogonal directions, in groups of D; false draws independent directions. The length of each is
    that of a Gaussian vector (§2.4)."""
    redraw: int = knob(0, least=0, unit="optimiser steps")
    """Optimiser steps between draws of new directions; 0 never draws new ones."""
    chunk: int = knob(64, least=1, unit="tokens")
    """Tokens of a chunk: causal weights are computed pair by pair within it, earlier chunks are one sum."""
    impl: Literal["auto", "plain", "chunked", "fla"] = knob("auto", younger=True)
    """Implementation of the causal sums. auto: plain on a CPU, chunked on other devices. plain: sums in
    float32 with a level for each feature, in pieces that fit into a cache, for any norms. chunked: few large
    matrix products in the dtype of the inputs, for norms up to a limit (`features.scaled_features`), over
    chunks of at least 128 tokens on an accelerator. fla: the same with the kernels of the package fla-core;
    untried. Bidirectional sums have one implementation, which is used for auto and plain."""

    def __post_init__(self) -> None:
        if self.impl == "fla":
            allowed = ", ".join(map(str, CHUNKS))
            self.require("chunk", self.chunk in CHUNKS, f"{allowed} with impl=fla")
            self.require("n_features", self.n_features % 2 == 0, "an even number with impl=fla")


class Performer(SequenceMixer):
    """FAVOR+: Σ_s φ(q_t)·φ(k_s) v_s / Σ_s φ(q_t)·φ(k_s), with a cost that is linear in T.

    The heads of a layer share their directions, as in the authors' code.

    Deviations from the paper: positions are rotary, and applied before the features. No constant is added to
    the softmax features, so the estimate is unbiased. The stabiliser of the keys is a running maximum of each
    feature. A maximum over the whole sequence would let later keys change the rounding of earlier outputs,
    and would underflow for queries whose features differ from those of the largest key. The package
    performer-pytorch adds 1e-4 to the softmax features, and uses the maximum over the sequence.

    The loss of a trained model may increase with more context. Measured after training on a million bytes
    (one seed, 65k test bytes): the nll was 2.368 nats after 64 bytes of history and 2.621 after 1,024; dense
    2.077 and 2.081. It is not explained by the number of features (m=1,024: 2.323 and 2.580), redrawing
    (2.492 and 2.653) or rotary positions (without: 2.610 and 2.666). The arithmetic of the sums and of the
    normaliser does not explain it either: the same features, computed densely in float64, gave the same
    figures in complete trainings of two seeds, and exact softmax with the trained projections changed the
    loss by at most 0.01 (after 250k bytes). Linear kernels that do not estimate softmax show the same
    increase: relu features 2.519 and 2.617, elu + 1 2.600 and 2.659.
    """

    Config = PerformerConfig
    config: PerformerConfig
    position_scheme = "rotary"
    info = Info(
        paper="Choromanski et al. 2020, Rethinking Attention with Performers, arXiv:2009.14794",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·m·D", source="Choromanski 2020, §2.2", survey=1),
        caps=Caps(causal=True, bidirectional=True),
    )
    IMPLS: ClassVar[Mapping[str, Impl]] = {
        "plain": Impl(
            run=causal_favor,
            flop_overhead_reason="causal: the last chunk is padded with zeros",
            auto_on=("cpu",),
        ),
        "chunked": Impl(
            run=chunked_favor,
            flop_overhead_reason=(
                "causal: all pairs of a chunk are computed, sums of chunks are added by matrix products, and "
                "the normaliser is one of 8 more channels of the values"
            ),
            auto_on=(Impl.OTHER_DEVICES,),
        ),
        "fla": Impl(
            run=fla_favor,
            missing=lambda device, dtype, head_dim: missing_fla(device),
            flop_overhead_reason=(
                "causal: all pairs of a chunk are computed, the last chunk is padded, and the normaliser is "
                "one of 8 more channels of the values"
            ),
            has_shape_functions=True,
            untried=True,
        ),
    }

    directions: Tensor

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """`chunked` and `fla` are implementations of causal sums only."""
        impl = getattr(config, "impl", "auto")
        if not causal and impl not in ("auto", "plain"):
            return f"impl={impl} has no bidirectional form"
        return super().no_form(config, causal=causal)

    def __init__(self, config: PerformerConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        self.register_buffer("directions", self._draw())  # (m, D)
        self.steps = 0

    def _draw(self) -> Tensor:
        """Draw directions (m, D), float32, with the global generator."""
        m, head_dim = self.config.n_features, self.dims.head_dim
        directions = torch.randn(m, head_dim, dtype=torch.float32)
        if not self.config.orthogonal:
            return directions
        groups = -(-m // head_dim)
        basis, triangle = torch.linalg.qr(torch.randn(groups, head_dim, head_dim, dtype=torch.float32))
        # the signs of QR are arbitrary; with a positive diagonal of R the bases are uniformly distributed
        basis = basis * triangle.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        orthogonal: Tensor = basis.mT.flatten(0, 1)[:m] * directions.norm(dim=-1, keepdim=True)
        return orthogonal

    def after_step(self) -> None:
        """Draw new directions after every `redraw` steps.

        The count is not a tensor, because a branch on a tensor would wait for the device.
        """
        self.steps += 1
        if self.config.redraw and self.steps % self.config.redraw == 0:
            with torch.device(self.directions.device):
                self.directions.copy_(self._draw())

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps, which a checkpoint stores in addition to the tensors."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """The inverse of `get_extra_state`."""
        self.steps = state["steps"]

    def _scaled(self, x: Tensor) -> Tensor:
        """The directions divided by D^¼, float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scaled: Tensor = self.directions.to(wide) * self.dims.head_dim**-0.25
        return scaled

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        directions, softmax = self._scaled(q), self.config.features == "softmax"
        with torch.autocast(x.device.type, enabled=False):  # exponents and sums need float32
            if ctx.causal:
                y = self.run_impl(q, k, v, directions, softmax, self.config.chunk, self.device_type)
            else:
                y = full_favor(q, k, v, directions, softmax, self.device_type)
        return MixerOut(self.projections.merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The quadratic form: the weight of each pair from the features, normalised over the allowed keys."""
        q, k, v = self.projections.split(x, ctx.positions)
        directions = self._scaled(q)
        h_q, h_k = q @ directions.mT, k @ directions.mT  # (B, H, T, m)
        if self.config.features == "relu":
            phi_q, phi_k = h_q.relu() + RELU_FLOOR, h_k.relu() + RELU_FLOOR
        else:
            root = math.sqrt(self.dims.head_dim)
            phi_q = (h_q - q.square().sum(-1, keepdim=True) / (2 * root)).exp()
            phi_k = (h_k - k.square().sum(-1, keepdim=True) / (2 * root)).exp()
        weights = phi_q @ phi_k.mT * self.attention_mask(x.shape[1], causal=ctx.causal).to(q)  # (B, H, T, T)
        return self.projections.merge(weights @ v / weights.sum(-1, keepdim=True))

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor | None:
        """Softmax attention, which softmax features estimate; None for relu features."""
        if self.config.features != "softmax":
            return None
        q, k, v = self.projections.split(x, ctx.positions)
        return self.projections.merge(
            masked_attention(q, k, v, self.attention_mask(x.shape[1], causal=ctx.causal))
        )

    def cost(self, work: Workload) -> Cost:
        """Projections, features of queries and keys, sums over keys, products of queries with the sums and,
        if causal, pairs within a chunk. The normaliser counts as one more channel of the values.

        Weights of pairs within two neighbouring tokens, and weighted values within four, are computed by
        elementwise products and sums. These count 0, as those of softmax do. Random projections are constant.
        """
        t, m, d = work.seq_len, self.config.n_features, work.head_dim
        per_head = 4 * t * m * (d + 1)
        if work.causal:
            chunk = self.config.chunk
            full, remainder = divmod(t, chunk)
            for number, c in ((full, chunk), (1, remainder)):
                pairs = c * (c - 1) // 2 - c // 2
                of_values = pairs - 4 * (c // 4) - (2 if c % 4 == 3 else 0)
                per_head += number * (pairs * 2 * m + of_values * 2 * d)
        return Cost(
            {
                "projections": Projections.flops(work),
                "features": work.batch_size * work.heads * 4 * t * m * d,
                "attention": work.batch_size * work.heads * per_head,
            },
            gradients={"features": 1},
        )

    def _exponents(self, x: Tensor, directions: Tensor) -> Tensor:
        """The logarithms (B, H, n, m) of the features of queries or keys x (B, H, n, D)."""
        along = x.to(directions.dtype) @ directions.mT
        if self.config.features == "relu":
            return (along.relu() + RELU_FLOOR).log()
        return along - x.to(along.dtype).square().sum(-1, keepdim=True) / (2 * math.sqrt(self.dims.head_dim))

    def init_state(self, batch_size: int, max_len: int, *, clock: Clock, dtype: torch.dtype) -> FeatureState:
        """The sums over keys."""
        shape = batch_size, self.dims.heads, self.config.n_features, self.dims.head_dim
        wide = torch.promote_types(dtype, torch.float32)
        return FeatureState(clock, max_len, shape, wide, self.directions.device)

    def step(self, x: Tensor, state: FeatureState) -> Tensor:
        """(B, n, C) → (B, n, C). A prompt is computed like a whole sequence, other tokens one by one."""
        q, k, v = self.projections.split_next(x, state.clock)
        softmax = self.config.features == "softmax"
        with torch.autocast(x.device.type, enabled=False):
            directions = self._scaled(q)
            exponents = self._exponents(k, directions)
            if state.clock.position == 0 and x.shape[1] > 1:
                y = self.run_impl(q, k, v, directions, softmax, self.config.chunk, self.device_type)
                state.add(exponents, v)
            else:
                queries, outputs = self._exponents(q, directions), []
                for token in range(x.shape[1]):
                    state.add(exponents[:, :, token : token + 1], v[:, :, token : token + 1])
                    outputs.append(state.read(queries[:, :, token]).to(v.dtype))
                y = torch.stack(outputs, dim=2)
        return self.projections.merge(y)

    def decoding_bytes(self, work: Workload) -> int:
        """The sums do not grow. For relu features they have levels too."""
        numbers = work.batch_size * work.heads * self.config.n_features * (work.head_dim + 2)
        return max(4, work.element_bytes) * numbers

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the float32 sums over keys of each head: m × D values, m normalisers and, for softmax
        features, m levels."""
        each = work.head_dim + (2 if self.config.features == "softmax" else 1)
        return 4 * work.batch_size * work.heads * self.config.n_features * each

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys or, if causal, the keys up to the query."""
        return masks.matrix(masks.causal if causal else masks.all_keys, seq_len)
