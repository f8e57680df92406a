"""Retention: linear attention with a fixed decay of each head, a group norm and a gate (Sun 2023,
arXiv:2307.08621).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import Caps, Complexity, Context, Info
from variants.ops.recurrences.fixed_decay import FixedDecayConfig, FixedDecayMixer
from variants.ops.recurrences.gated_norm import GatedNorm
from variants.ops.recurrences.scan_features import Identity

EPS = 1e-5
"""Added to the variance of the channels of a head."""


@dataclass(frozen=True, kw_only=True)
class RetnetConfig(FixedDecayConfig):
    """Knobs of retention."""


class Retnet(FixedDecayMixer):
    """W_O (swish(W_G x) ∘ norm(y)), y_t = Σ_{s ≤ t} γ^(t − s) (q_t·k_s / √D) v_s, with γ_h = 1 − 2^(−5 − h).

    The norm is a group norm with one group for each head: mean 0 and variance 1 over its channels. It cancels
    any positive factor of y_t, so the score normalisations of the paper (§2.2) are left out: they are such
    factors, apart from the ε of the norm. It also divides the y of a first token, (q·k) v, by q·k. Where that
    is near 0, gradients are large; in bfloat16 rounding decides them, which the reference gate may report.

    Parameters: 5·C², because values are as wide as queries. In the paper, they are twice as wide, and the
    feed-forward layer is narrower in turn.

    Deviations from the paper: the positions are rotary without the magnitudes of xPos (Sun 2022,
    arXiv:2212.10554), which would be a second decay. The norm has no learnt weights and biases, as in the
    authors' code; the output projection can absorb the weights.
    """

    Config = RetnetConfig
    config: RetnetConfig
    position_scheme = "rotary"
    features = Identity()
    info = Info(
        paper="Sun et al. 2023, Retentive Network, arXiv:2307.08621",
        family="kernels",
        complexity=Complexity(
            time=1, memory=1, formula="T·D·(D + c)", source="Sun 2023, abstract (the chunkwise form)"
        ),
        caps=Caps(causal=True, bidirectional=False),
    )

    @property
    def norm(self) -> GatedNorm:
        """The norm of y·√D, which is that of y with another ε."""
        return GatedNorm("silu", centred=True, eps=EPS * self.dims.head_dim)

    def log_decay(self, device: torch.device) -> Tensor:
        """log(1 − 2^(−5 − h))."""
        head = torch.arange(self.dims.heads, device=device, dtype=torch.float64)
        return (-torch.exp2(-5 - head)).log1p()

    def reference(self, x: Tensor, ctx: Context) -> Tensor:
        """The parallel form (eq. 5) with the group norm of torch."""
        q, k, v = self.projections.split(x, ctx.positions)
        y = self.weighted_sums(q * self.dims.head_dim**-0.5, k, v)  # (B, H, T, D)
        y = F.layer_norm(y, y.shape[-1:], eps=EPS).transpose(1, 2).flatten(2)
        reference: Tensor = self.projections.out(F.silu(self.gate(x)) * y)
        return reference
