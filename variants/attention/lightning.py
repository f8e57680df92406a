"""Lightning attention: unnormalised linear attention with a fixed decay of each head and layer (Qin 2024,
arXiv:2401.04658), in the layer of MiniMax-01 (arXiv:2501.08313).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from variants.base import Caps, Clock, Complexity, Context, Dims, Info
from variants.knobs import knob
from variants.ops.recurrences.fixed_decay import FixedDecayConfig, FixedDecayMixer, Heads
from variants.ops.recurrences.gated_norm import GatedNorm
from variants.ops.recurrences.scan_features import Silu

EPS = 1e-5
"""Added to the mean square of the channels of a token, and to the slopes' factor."""


@dataclass(frozen=True, kw_only=True)
class LightningConfig(FixedDecayConfig):
    """Knobs of the decays and of the causal sums."""

    decay_layers: int = knob(12, least=1, unit="layers")
    """Number of layers over which decays weaken; see the layer. The depth of the model, in the papers. The
    lowest layer decays most; the last of these layers, and any layer above, hardly decays."""


class Lightning(FixedDecayMixer):
    """W_O (sigmoid(W_G x) ∘ norm(y)), with y_t = Σ_{s ≤ t} λ^(t − s) (silu(q_t)·silu(k_s)) silu(v_s).

    λ = exp(−2^(−8 (h + 1)/H) · f_l) for head h of H. The factor f_l of layer l falls from 1 to 10⁻⁵ over the
    n layers of `decay_layers`: f_l = max(1 − l / (n − 1), 0) + 10⁻⁵. There is no denominator, and queries are
    not divided by √D: the norm is an RMS norm of all channels of a token, with a learnt weight for each.

    Parameters: 5·C², of which C² are those of the gate; dense attention has 4·C².

    Deviations from the papers: a layer does not know the depth of its model, so the depth is a knob of its
    own. No layer has other positions than its decay, as in the lightning layers of MiniMax-01; the models of
    Qin 2024 add another encoding in their lowest layer.
    """

    Config = LightningConfig
    config: LightningConfig
    position_scheme = "relative"
    features = Silu()
    norm_of_heads = False
    info = Info(
        paper="Qin et al. 2024, Lightning Attention-2, arXiv:2401.04658",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·D·(D + c)", source="Qin 2024, abstract"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: LightningConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.scale = nn.Parameter(torch.ones(dims.inner_dim))

    @property
    def norm(self) -> GatedNorm:
        """RMS norm, and a sigmoid."""
        return GatedNorm("sigmoid", eps=EPS)

    def log_decay(self, device: torch.device) -> Tensor:
        """The slope of each head (Press 2021, arXiv:2108.12409), times the factor of the layer."""
        head = torch.arange(1, self.dims.heads + 1, device=device, dtype=torch.float64)
        factor = max(1 - self.layer / max(self.config.decay_layers - 1, 1), 0) + EPS
        return -torch.exp2(head * (-8 / self.dims.heads)) * factor

    def heads_of(self, x: Tensor, positions: Tensor | None) -> Heads:
        """Without rotary positions."""
        inner = self.dims.inner_dim
        w_qk, w_v = self.projections.qkv.weight.split([2 * inner, inner])
        # two products: if v were a view of one, its activation would keep queries and keys as well
        q, k = F.linear(x, w_qk).unflatten(-1, (2, self.dims.heads, -1)).unbind(2)
        v = F.silu(F.linear(x, w_v)).unflatten(-1, (self.dims.heads, -1))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def next_heads(self, x: Tensor, clock: Clock) -> Heads:
        """The same: there are no positions."""
        return self.heads_of(x, None)

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The quadratic form, with an RMS norm written out."""
        qkv = F.silu(self.projections.qkv(x)).unflatten(-1, (3, self.dims.heads, -1))
        y = self.weighted_sums(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        assert self.scale is not None
        y = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt() * self.scale
        reference: Tensor = self.projections.out(self.gate(x).sigmoid() * y)
        return reference
