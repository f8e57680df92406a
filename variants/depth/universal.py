"""The Universal Transformer: one block, visited again and again (Dehghani 2018, arXiv:1807.03819, §2).

Deviations: the number of visits is fixed, because there is no adaptive halting (§2.2). With `signal=true`
each visit is told its number, by the part of the coordinate embedding (§2.1) that depends on the step; the
part that depends on the position is left to the mixer. The block is this model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from variants.base import DepthConfig, DepthSchedule
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class UniversalConfig(DepthConfig):
    """The number of visits is the model's depth."""

    signal: bool = knob(False, younger=True)
    """Add sinusoids of the number of the visit to the hidden states before each visit."""


class Universal(DepthSchedule):
    """Block 0, `depth` times: the cost of a stack of this depth with the parameters of one block."""

    Config = UniversalConfig
    config: UniversalConfig
    paper = "Dehghani et al. 2018, Universal Transformers, arXiv:1807.03819"

    def visits(self) -> Sequence[int]:
        """Block 0 each time."""
        return [0] * self.depth

    def signals(self, d_model: int) -> Tensor | None:
        """sin(t / 10000^(2j / C)) in channel 2j and the cosine in channel 2j + 1, for visits t = 1, 2, …

        The paper's embeddings have a standard deviation of 1, hence the unit of `DepthSchedule.signals`.
        """
        if not self.config.signal:
            return None
        channel = torch.arange(d_model)
        rate = 10_000.0 ** -((channel - channel % 2) / d_model)
        angle = torch.arange(1, self.depth + 1)[:, None] * rate
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
