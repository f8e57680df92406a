"""Positions of learnt vectors that stand among the tokens of a sequence.

Shapes: T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def middles_of_parts(count: int, seq_len: int, positions: Tensor | None, device: torch.device) -> Tensor:
    """Positions (count,) float64 of the middles of `count` equal parts of a sequence of T = `seq_len` tokens.

    `positions` (T,) are consecutive; None: 0 … T−1. If they are shifted, so are the results, so that scores
    with rotary positions depend on distances alone.
    """
    first, last = (0, seq_len - 1) if positions is None else (positions[0], positions[-1])
    middle = (torch.arange(count, device=device, dtype=torch.float64) + 0.5) / count
    return first + (last - first) * middle
