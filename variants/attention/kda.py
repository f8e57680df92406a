"""Kimi Delta Attention: the delta rule with a decay of each channel of the keys (Kimi Team 2025,
arXiv:2510.26692).

Shapes: B batch, T tokens, C channels, H heads, D channels of a head, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from variants.base import Caps, Complexity, Dims, Info, Workload
from variants.knobs import knob
from variants.ops.recurrences.decay_gates import DecayRates
from variants.ops.recurrences.delta_mixer import DeltaConfig, DeltaMixer, implementations, wide_linear


@dataclass(frozen=True, kw_only=True)
class KdaConfig(DeltaConfig):
    """Knobs of the gates, of the convolution and of the chunks."""

    rank: int = knob(16, least=1, unit="channels")
    """Rank of the projections of the decays, and of that of the output gate."""

    kernel: ClassVar[str] = "kda"


class Kda(DeltaMixer):
    """S_t = (I − β_t k_t k_tᵀ) Diag(α_t) S_{t−1} + β_t k_t v_tᵀ, with a decay for each channel of the keys.

    α = exp(−exp(A) softplus(W↑W↓ x + b)), with A learnt for each head, and b for each channel. Outputs are
    normalised, multiplied by the sigmoid of another projection of low rank, and projected. All else is as in
    `delta_net`.

    Parameters: 4·C·r of the gates more than dense attention. The paper's rank is D, which here would be a
    quarter of the width, and not the 1/18 of its model.

    Deviations from the paper: its model has a layer of full attention after three of these, which is
    `variant=hybrid` here.
    """

    Config = KdaConfig
    config: KdaConfig
    IMPLS = implementations(KdaConfig.kernel)
    activation = "sigmoid"
    info = Info(
        paper="Kimi Team 2025, Kimi Linear, arXiv:2510.26692",
        family="kernels",
        complexity=Complexity(
            time=1, memory=1, formula="T·c·D + T·D²", source="Kimi Team 2025, chunkwise form"
        ),
        caps=Caps(causal=True, bidirectional=False),
    )

    def __init__(self, config: KdaConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.decay, self.output_gate = (
            nn.Sequential(
                nn.Linear(dims.d_model, config.rank, bias=False),
                nn.Linear(config.rank, dims.inner_dim, bias=False),
            )
            for _ in range(2)
        )
        self.rates = DecayRates(dims.heads, dims.head_dim)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, H·D) → (B, H, T, D)."""
        heads: Tensor = x.unflatten(-1, (self.dims.heads, -1))
        return heads.transpose(1, 2)

    def log_decay(self, x: Tensor) -> Tensor:
        """log α (B, H, T, D), float32 or wider."""
        for part in self.decay:
            x = wide_linear(x, part.get_parameter("weight"))
        rates: Tensor = self.rates(self._heads(x))
        return rates

    def gate(self, x: Tensor) -> Tensor:
        """(B, H, T, D)."""
        return self._heads(self.output_gate(x))

    def extra_flops(self, work: Workload) -> int:
        """Two projections of low rank."""
        return 4 * work.batch_size * work.seq_len * self.config.rank * (work.d_model + work.inner_dim)
