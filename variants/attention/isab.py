"""Induced set attention: tokens read m points, which read all tokens (Lee 2019, arXiv:1810.00825, §3.1).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, m inducing points.
"""

from __future__ import annotations

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
from variants.ops.patterns import masks
from variants.ops.projections import Projections, masked_attention, rotary
from variants.ops.spaced_positions import middles_of_parts


@dataclass(frozen=True, kw_only=True)
class IsabConfig(VariantConfig):
    """Knobs of induced set attention."""

    points: int = knob(64, least=1, unit="points")
    """Inducing points: learnt vectors that read all tokens, and are then read by all tokens."""
    weights: Literal["shared", "separate"] = "shared"
    """Projections of the two attentions. separate: each has its own four, as in the paper. shared: both use
    the same four, so that the layer has as many as dense attention."""


class Isab(SequenceMixer):
    """H = norm(I + attention(I, X)), then y = attention(X, H), for learnt inducing points I (§3.1, eq. 9–10).

    A layer is the two multi-head attentions of the paper's ISAB. The block of the model does what surrounds
    the second one: it adds X, normalises and has the feed-forward layer. The first one has its residual I and
    its layer normalisation here. Its feed-forward layer is left out, because the one of the block would be
    doubled.

    Deviations from the paper: tokens have positions, since a sequence is no set. They are rotary, and the
    inducing points are placed at equal distances along the sequence, so that scores depend on distances
    alone. The paper normalises after each residual; here the blocks normalise their inputs.
    """

    Config = IsabConfig
    config: IsabConfig
    position_scheme = "rotary"
    info = Info(
        paper="Lee et al. 2019, Set Transformer, arXiv:1810.00825",
        family="memory",
        complexity=Complexity(time=1, memory=1, formula="T·m", source="Lee 2019, §3.1", survey=1),
        caps=Caps(causal=False, bidirectional=True),
    )

    def __init__(self, config: IsabConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        """Of the tokens that read the points; with shared weights, of both attentions."""
        if config.weights == "separate":
            self.induction = Projections(dims)
        points = torch.randn(config.points, dims.d_model, dtype=torch.float32)
        self.points = nn.Parameter(points.to(torch.get_default_dtype()))
        self.norm = nn.LayerNorm(dims.d_model)

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: every inducing point reads all tokens, later ones too"
        return super().no_form(config, causal=causal)

    def _inducing(self) -> Projections:
        """The projections of the attention by which the points read the tokens."""
        return self.induction if self.config.weights == "separate" else self.projections

    def _point_positions(self, seq_len: int, positions: Tensor | None) -> Tensor:
        """Positions (m,) float64 of the points: the middles of m equal parts of the sequence."""
        return middles_of_parts(self.config.points, seq_len, positions, self.points.device)

    def _project(self, x: Tensor, weight: Tensor, parts: int, positions: Tensor | None) -> list[Tensor]:
        """(B, T, C) → `parts` of (B, H, T, D) by rows of the weight, which have rotary positions except the
        last of two or three."""
        heads, turned = self.dims.heads, max(1, parts - 1)
        w_turned, *w_plain = weight.split(
            [turned * self.dims.inner_dim] + [self.dims.inner_dim] * (parts > 1)
        )
        found = rotary(
            F.linear(x, w_turned).unflatten(-1, (turned, heads, -1)), positions, self.dims.rotary_base
        )
        plain = [F.linear(x, w).unflatten(-1, (heads, -1)) for w in w_plain]
        return [t.transpose(1, 2) for t in (*found.unbind(2), *plain)]

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        inner, inducing, reading = self.dims.inner_dim, self._inducing(), self.projections
        at = self._point_positions(x.shape[1], ctx.positions)
        if self.config.weights == "shared":
            q, k, v = reading.split(x, ctx.positions)
        else:
            (q,) = self._project(x, reading.qkv.weight[:inner], 1, ctx.positions)
            k, v = self._project(x, inducing.qkv.weight[inner:], 2, ctx.positions)
        (asking,) = self._project(self.points[None], inducing.qkv.weight[:inner], 1, at)
        found = F.scaled_dot_product_attention(asking.expand(len(x), -1, -1, -1), k, v)
        hidden = self.norm(self.points + inducing.merge(found))  # (B, m, C)
        k, v = self._project(hidden, reading.qkv.weight[inner:], 2, at)
        return MixerOut(reading.merge(F.scaled_dot_product_attention(q, k, v)))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """Two attentions with all their weights, each with all four projections."""
        self.require_objective(causal=ctx.causal)
        at = self._point_positions(x.shape[1], ctx.positions)

        def attention(projections: Projections, asking: Tensor, asked: Tensor, *positions: Any) -> Tensor:
            q = projections.split(asking, positions[0])[0]
            _, k, v = projections.split(asked, positions[1])
            everything = torch.ones(asking.shape[1], asked.shape[1], dtype=torch.bool)
            return projections.merge(masked_attention(q, k, v, everything))

        points = self.points.expand(len(x), -1, -1)
        hidden = points + attention(self._inducing(), points, x, at, ctx.positions)
        return attention(self.projections, x, self.norm(hidden), ctx.positions, at)

    def cost(self, work: Workload) -> Cost:
        """Projections of the tokens, and of the points as queries (once for all sequences), outputs, keys and
        values; two attentions of T·m pairs."""
        m, each = self.config.points, 2 * work.d_model * work.inner_dim
        return Cost(
            {
                "projections": Projections.flops(work),
                "memory": each * m * (1 + 3 * work.batch_size),
                "attention": 8 * work.batch_size * work.inner_dim * work.seq_len * m,
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the keys and values of all tokens: with a further token, the positions of the points and
        so all their weights change."""
        return 2 * work.batch_size * work.seq_len * work.inner_dim * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys; they are read through the inducing points."""
        return masks.matrix(masks.all_keys, seq_len)
