"""LayerDrop: training leaves out each visit with a probability (Fan 2019, arXiv:1909.11556, §3.1).

What is left out is not computed: x stays as it is, and the parameters of the block have no gradient in this
step. The visits that a pass makes are drawn before the pass, so that a strategy that recomputes activations
runs the same ones, and blocks have the same shapes and the same compiled code as those of a stack. In
evaluation and decoding every block is visited, without another scale (unlike Huang 2016, arXiv:1603.09382,
§3, the paper has none).

Figures of the cost of a step (FLOPs, memory, time, plans) are those of all visits: the most that a step
costs. On average training costs 1 − rate of what the blocks cost. A budget of FLOPs counts all visits.

Pruning after training (§3.2) is a measurement: `measure.prune_windows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from variants.base import DepthConfig, DepthSchedule
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class LayerDropConfig(DepthConfig):
    """How many visits are left out."""

    rate: float = knob(0.2, least=0, below=1)
    """Probability that a visit is left out in a pass of training; 0 is a stack."""


class LayerDrop(DepthSchedule):
    """Blocks 0, 1, …, depth − 1, of which each pass in training leaves out some."""

    Config = LayerDropConfig
    config: LayerDropConfig
    paper = "Fan et al. 2019, Reducing Transformer Depth on Demand with Structured Dropout, arXiv:1909.11556"

    def visits(self) -> Sequence[int]:
        """Each once."""
        return range(self.depth)

    @property
    def leaves_out(self) -> bool:
        """With a rate of 0 nothing is drawn, so that the other random numbers are those of a stack."""
        return self.config.rate > 0

    def draw(self) -> Sequence[int]:
        """Each place with probability 1 − rate, independently; there may be none."""
        kept: list[int] = (torch.rand(self.depth, device="cpu") >= self.config.rate).nonzero()[:, 0].tolist()
        return kept
