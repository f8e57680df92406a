"""Gated DeltaNet: the delta rule with a decay of the state and a gate of the outputs (Yang 2024,
arXiv:2412.06464).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from variants.base import Caps, Complexity, Dims, Info, Workload
from variants.ops.recurrences.decay_gates import DecayRates
from variants.ops.recurrences.delta_mixer import DeltaConfig, DeltaMixer, implementations, wide_linear


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(DeltaConfig):
    """Knobs of the convolution and of the chunks."""

    kernel: ClassVar[str] = "gated_delta_rule"


class GatedDeltaNet(DeltaMixer):
    """S_t = α_t (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, with one decay α_t for each head and token.

    α = exp(−exp(A) softplus(w·x + b)), with A and b learnt for each head. Outputs are normalised, multiplied
    by swish of a projection of x, and projected. All else is as in `delta_net`.

    Parameters: C² of the gate more than dense attention.

    Deviations from the paper: keys are as wide as values, and heads as many as in all layers here; the
    authors' keys have 3/4 of the model's width, and values 3/2.
    """

    Config = GatedDeltaNetConfig
    config: GatedDeltaNetConfig
    IMPLS = implementations(GatedDeltaNetConfig.kernel)
    info = Info(
        paper="Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464",
        family="kernels",
        complexity=Complexity(time=1, memory=1, formula="T·c·D + T·D²", source="Yang 2024, chunkwise form"),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: GatedDeltaNetConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.decay = nn.Linear(dims.d_model, dims.heads, bias=False)
        self.rates = DecayRates(dims.heads, 1)
        self.output_gate = nn.Linear(dims.d_model, dims.inner_dim, bias=False)

    def log_decay(self, x: Tensor) -> Tensor:
        """log α (B, H, T, 1), float32 or wider."""
        logits = wide_linear(x, self.decay.weight).transpose(1, 2)
        rates: Tensor = self.rates(logits.unsqueeze(-1))
        return rates

    def gate(self, x: Tensor) -> Tensor:
        """(B, H, T, D)."""
        gates: Tensor = self.output_gate(x).unflatten(-1, (self.dims.heads, -1))
        return gates.transpose(1, 2)

    def extra_flops(self, work: Workload) -> int:
        """Two projections."""
        return 2 * work.batch_size * work.seq_len * work.d_model * (work.heads + work.inner_dim)
