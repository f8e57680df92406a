"""Lightweight convolutions: depthwise, with softmax taps that heads share (Wu 2019, arXiv:1901.10430).

Shapes: B batch, T tokens, C channels, H heads, R channels of a head, k taps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from variants.base import Caps, Complexity, Dims, Info, Workload
from variants.ops.convolutions.convolution_mixer import ConvolutionConfig, ConvolutionMixer


@dataclass(frozen=True, kw_only=True)
class LightConvConfig(ConvolutionConfig):
    """Knobs of the convolution."""


class LightConv(ConvolutionMixer):
    """Σ_j softmax(w_h)_j x_{t−k+1+j}, with k parameters w for each head; gated inputs.

    Parameters: 3·C² of the projections, where dense attention has 4·C², and k for each head.

    Deviations from the paper: projections have no biases, as all layers here. Taps have no dropout. The
    number of taps is the same in all layers by default.
    """

    Config = LightConvConfig
    config: LightConvConfig
    info = Info(
        paper="Wu et al. 2019, Lightweight and Dynamic Convolutions, arXiv:1901.10430",
        family="fixed patterns",
        complexity=Complexity(time=1, memory=1, formula="T·k·C", source="Wu 2019, abstract"),
        caps=Caps(causal=True, bidirectional=True),
    )

    def __init__(self, config: LightConvConfig, dims: Dims, layer: int = 0) -> None:
        super().__init__(config, dims, layer)
        self.taps = nn.Parameter(torch.empty(dims.heads, self.kernel))
        # as a convolution of one input channel, as in the authors' code
        nn.init.xavier_uniform_(self.taps[:, None])

    def logits(self, h: Tensor) -> Tensor:
        """The parameters (H, k)."""
        return self.taps

    def tap_flops(self, work: Workload) -> int:
        """The parameters are the logits."""
        return 0
