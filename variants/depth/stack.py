"""Every block once, from the lowest to the highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from variants.base import DepthConfig, DepthSchedule


@dataclass(frozen=True, kw_only=True)
class StackConfig(DepthConfig):
    """A stack has no knobs."""


class Stack(DepthSchedule):
    """Blocks 0, 1, …, depth − 1."""

    Config = StackConfig
    paper = "Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762"

    def visits(self) -> Sequence[int]:
        """Each once."""
        return range(self.depth)
