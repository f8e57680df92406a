"""Dynamic convolutions: softmax taps that depend on the token (Wu 2019, arXiv:1901.10430).

Shapes: B batch, T tokens, C channels, H heads, R channels of a head, k taps.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from variants.base import Caps, Complexity, Dims, Info, Workload
from variants.ops.convolutions.convolution_mixer import ConvolutionConfig, ConvolutionMixer


@dataclass(frozen=True, kw_only=True)
class DynamicConvConfig(ConvolutionConfig):
    """Knobs of the convolution."""


class DynamicConv(ConvolutionMixer):
    """Σ_j softmax(W_h x_t)_j x_{t−k+1+j}, with k logits for each head, a linear map of the token; gated
    inputs.

    Parameters: 3·C² of the projections and H·k·C of the logits; dense attention has 4·C². The logits are a
    map of the gated input, as in the authors' code.

    Deviations from the paper: projections have no biases, as all layers here. Taps have no dropout. The
    number of taps is the same in all layers by default.
    """

    Config = DynamicConvConfig
    config: DynamicConvConfig
    info = Info(
        paper="Wu et al. 2019, Lightweight and Dynamic Convolutions, arXiv:1901.10430",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·k·C", source="Wu 2019, abstract"),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: DynamicConvConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.taps = nn.Linear(dims.inner_dim, dims.heads * self.kernel, bias=False)

    def logits(self, h: Tensor) -> Tensor:
        """(B, T, H·R) → (B, T, H, k)."""
        logits: Tensor = self.taps(h).unflatten(-1, (self.dims.heads, self.kernel))
        return logits

    def tap_flops(self, work: Workload) -> int:
        """One product of each token's channels with the weights of H·k logits."""
        tokens = work.batch_size * work.seq_len
        return 2 * tokens * work.inner_dim * work.heads * self.kernel
