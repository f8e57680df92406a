"""The Universal Transformer: one block, visited again and again (Dehghani 2018, arXiv:1807.03819, §2).

Deviations: the number of visits is fixed, because there is no adaptive halting (§2.2), and nothing tells a
visit its number, because there is no coordinate embedding of the step (§2.1). The block is this model's own,
with pre-norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from variants.base import DepthConfig, DepthSchedule


@dataclass(frozen=True, kw_only=True)
class UniversalConfig(DepthConfig):
    """The number of visits is the model's depth; there are no other knobs."""


class Universal(DepthSchedule):
    """Block 0, `depth` times: the cost of a stack of this depth with the parameters of one block."""

    Config = UniversalConfig
    paper = "Dehghani et al. 2018, Universal Transformers, arXiv:1807.03819"

    def visits(self) -> Sequence[int]:
        """Block 0 each time."""
        return [0] * self.depth
