"""Groups of blocks that share their parameters: ALBERT (Lan 2019, arXiv:1909.11942, §3.1), and the orders of
Takase 2021 (Lessons on Parameter Sharing across Layers in Transformers, arXiv:2104.06022, §2).

A model of depth N with M groups has M blocks, and visits each of them N / M times:

    order     N = 6, M = 3      N = 9, M = 3
    sequence  0 0 1 1 2 2       0 0 0 1 1 1 2 2 2
    cycle     0 1 2 0 1 2       0 1 2 0 1 2 0 1 2
    reverse   0 1 2 2 1 0       0 1 2 0 1 2 2 1 0

ALBERT shares in sequence; its models have one group, which is the schedule of `universal`. With N groups,
nothing is shared, and every order is a stack.

Deviations: M divides N (Takase's code allows a last block with fewer visits), all parameters of a block are
shared (ALBERT's §4.5 also compares sharing those of attention alone, or of the feed-forward layer alone), and
the block is this model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from variants.base import DepthConfig, DepthSchedule
from variants.knobs import knob


@dataclass(frozen=True, kw_only=True)
class SharedConfig(DepthConfig):
    """How many blocks there are, and in which order they are visited."""

    groups: int = knob(1, least=1, unit="groups")
    """Groups of visits that share a block, which is the number of blocks. They divide the depth."""
    order: Literal["sequence", "cycle", "reverse"] = "sequence"
    """Order of the visits. sequence: each block several times in a row. cycle: all blocks in turn, and then
    again. reverse: as cycle, but from the highest to the lowest in the last turn."""


class Shared(DepthSchedule):
    """`groups` blocks, visited depth / groups times each: the cost of a stack of this depth with the
    parameters of `groups` blocks."""

    Config = SharedConfig
    config: SharedConfig
    paper = "Lan et al. 2019, ALBERT, arXiv:1909.11942; the orders: Takase & Kiyono 2021, arXiv:2104.06022"

    @classmethod
    def impossible(cls, config: Any, depth: int) -> str | None:
        """Every group has equally many visits."""
        if depth % config.groups == 0:
            return None
        pairs = ((n, depth // n) for n in range(1, math.isqrt(depth) + 1) if depth % n == 0)
        nearest = max(divisor for pair in pairs for divisor in pair if divisor < config.groups)
        return f"groups={config.groups}: must divide depth={depth}; the nearest smaller divisor is {nearest}"

    def visits(self) -> Sequence[int]:
        """See the table at the top of the file."""
        groups, times = self.config.groups, self.depth // self.config.groups
        if self.config.order == "sequence":
            return [group for group in range(groups) for _ in range(times)]
        turns = [range(groups)] * times
        if self.config.order == "reverse" and times > 1:
            turns[-1] = range(groups - 1, -1, -1)
        return [group for turn in turns for group in turn]
