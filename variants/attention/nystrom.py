"""Nyström attention: softmax attention through landmarks (Xiong 2021, arXiv:2102.03902).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, m landmarks, w width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from variants.ops.convolutions.depthwise import OVERHEAD, depthwise, taps_flops
from variants.ops.patterns import masks
from variants.ops.projections import Projections, masked_attention
from variants.ops.pseudo_inverse import FLOPS_PER_STEP, pseudo_inverse
from variants.ops.segments.segment_means import segment_bounds, segment_means


@dataclass(frozen=True, kw_only=True)
class NystromConfig(VariantConfig):
    """Knobs of Nyström attention."""

    landmarks: int = knob(64, least=1, unit="segments")
    """Segments whose mean query and mean key are landmarks; a shorter sequence has one for each token."""
    pinv_steps: int = knob(6, least=1, unit="steps")
    """Steps of the iteration that approximates the pseudo-inverse of the landmarks' attention."""
    conv: int = knob(33, least=0, unit="tokens")
    """Width of the convolution of the values that is added to the output, an odd number; 0: none."""

    def __post_init__(self) -> None:
        self.require("conv", self.conv % 2 == 1 or not self.conv, "0 or an odd number of tokens")


class Nystrom(SequenceMixer):
    """softmax(QK̃ᵀ) · pinv(softmax(Q̃K̃ᵀ)) · softmax(Q̃Kᵀ)V, and a convolution of V (eq. 17, fig. 4).

    Q̃ and K̃ are the means of m segments of queries and keys. If T is no multiple of m, the first T mod m
    segments are one token longer than the others; nothing is padded. The pseudo-inverse is Razavi's third
    order iteration (eq. 14), in float32 or wider. No matrix is larger than T × m: the two products with V are
    attention to the tokens by m queries, and attention to m keys by the tokens.

    The convolution has one filter for each head, as in the authors' code (fig. 4, "DConv"). The iteration
    starts from Aᵀ / (‖A‖₁‖A‖∞) of each matrix, as in the paper. The authors' code divides by default by the
    maximum over all sequences and heads, by which a sequence would depend on the others of its batch.

    Deviations from the paper: positions are rotary, and are applied before the means, so a landmark contains
    the angles of all positions of its segment. The paper pads T to a multiple of m.
    """

    Config = NystromConfig
    config: NystromConfig
    position_scheme = "rotary"
    info = Info(
        paper="Xiong et al. 2021, Nyströmformer, arXiv:2102.03902",
        family="low rank",
        complexity=Complexity(
            time=1, memory=1, formula="T·m", source="Xiong 2021, complexity analysis", survey=1
        ),
        caps=Caps(causal=False, bidirectional=True),
    )

    def __init__(self, config: NystromConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.projections = Projections(dims)
        if config.conv:
            weights = torch.randn(dims.heads, config.conv, dtype=torch.float32) * config.conv**-0.5
            self.flop_overhead_reason = OVERHEAD
            self.filters = nn.Parameter(weights.to(torch.get_default_dtype()))

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        """There is no causal form."""
        if causal:
            return "has no causal form: landmarks are means over segments, later tokens included"
        return super().no_form(config, causal=causal)

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> MixerOut:
        """(B, T, C) → MixerOut; carries no state."""
        q, k, v = self.projections.split(x, ctx.positions)
        q_means, k_means = (segment_means(t, self.config.landmarks) for t in (q, k))
        read = F.scaled_dot_product_attention(q_means, k, v)  # (B, H, m, D)
        with torch.autocast(x.device.type, enabled=False):  # half precision does not converge
            wide = torch.promote_types(q_means.dtype, torch.float32)
            among = (q_means.to(wide) @ k_means.to(wide).mT * self.dims.head_dim**-0.5).softmax(dim=-1)
            solved = pseudo_inverse(among, self.config.pinv_steps) @ read.to(wide)
        y = F.scaled_dot_product_attention(q, k_means, solved.to(q.dtype))
        if self.config.conv:
            y = y + depthwise(v, self.filters)
        return MixerOut(self.projections.merge(y))

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """All three matrices and the convolution written out, with (T, T) weights."""
        self.require_objective(causal=ctx.causal)
        q, k, v = self.projections.split(x, ctx.positions)
        scale, seq_len = q.shape[-1] ** -0.5, x.shape[1]
        bounds = segment_bounds(seq_len, self.config.landmarks)
        q_means, k_means = (torch.stack([t[:, :, a:b].mean(dim=2) for a, b in bounds], dim=2) for t in (q, k))
        rows, middle, columns = (
            torch.softmax(torch.einsum("bhid,bhjd->bhij", a, b) * scale, dim=-1)
            for a, b in ((q, k_means), (q_means, k_means), (q_means, k))
        )
        wide = middle.to(torch.promote_types(middle.dtype, torch.float32))
        eye = torch.eye(len(bounds), dtype=wide.dtype, device=wide.device)
        norms = wide.sum(dim=-2).amax(dim=-1) * wide.sum(dim=-1).amax(dim=-1)  # no entry is negative
        inverse = wide.transpose(-1, -2) / norms[..., None, None]
        for _ in range(self.config.pinv_steps):
            product = wide @ inverse
            inverse = inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product))) / 4
        y = (rows @ inverse.to(rows.dtype) @ columns) @ v
        if self.config.conv:
            reach = self.config.conv // 2
            index = torch.arange(seq_len, device=x.device)
            offset = index - index[:, None] + reach  # (T, T): of query i and key j
            inside = (offset >= 0) & (offset < self.config.conv)
            taps = self.filters[:, offset.clamp(0, self.config.conv - 1)] * inside  # (H, T, T)
            y = y + torch.einsum("hij,bhjd->bhid", taps, v)
        return self.projections.merge(y)

    def softmax_target(self, x: Tensor, ctx: Context) -> Tensor | None:
        """Softmax attention without landmarks. With a convolution, the layer is not an estimate of it."""
        if self.config.conv:
            return None
        q, k, v = self.projections.split(x, ctx.positions)
        allowed = self.attention_mask(x.shape[1], causal=ctx.causal)
        return self.projections.merge(masked_attention(q, k, v, allowed))

    def cost(self, work: Workload) -> Cost:
        """Two attentions of T·m pairs; attention among landmarks, its pseudo-inverse and the product with it;
        the taps of the convolution, also beyond the ends."""
        t, m, head_dim = work.seq_len, min(self.config.landmarks, work.seq_len), work.head_dim
        each = work.batch_size * work.heads
        return Cost(
            {
                "projections": Projections.flops(work),
                "attention": 8 * each * t * m * head_dim,
                "landmarks": each * (4 * m * m * head_dim + self.config.pinv_steps * FLOPS_PER_STEP * m**3),
                "convolution": each * head_dim * (taps_flops(self.config.conv, t) if self.config.conv else 0),
            }
        )

    def state_bytes(self, work: Workload) -> int:
        """Bytes of the queries, keys and values of all tokens: a further token moves the segments."""
        return 3 * work.batch_size * work.seq_len * work.inner_dim * work.element_bytes

    def attention_mask(self, seq_len: int, *, causal: bool) -> Tensor:
        """All keys; they are read through the landmarks."""
        return masks.matrix(masks.all_keys, seq_len)
