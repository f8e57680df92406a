"""What decoding keeps for a memory of linear attention that is read by whole segments.

Shapes: B batch, K heads of keys, n tokens of a step, D channels of a head, s tokens of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Clock, DecodingState


class InfiniState(DecodingState):
    """The memory (B, K, D, D) and (B, K, D), what the open segment adds to it, and its rotated keys and its
    values (B, K, s, D)."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, D)."""
        super().__init__(clock, max_len)
        batch, heads, channels = shape
        wide = torch.promote_types(dtype, torch.float32)
        self.matrix, self.new_matrix = (
            torch.zeros(batch, heads, channels, channels, dtype=wide, device=device) for _ in range(2)
        )
        self.norm, self.new_norm = (
            torch.zeros(batch, heads, channels, dtype=wide, device=device) for _ in range(2)
        )
        self.keys, self.values = (
            torch.zeros(batch, heads, tokens, channels, dtype=dtype, device=device) for _ in range(2)
        )

    def add(self, features: Tensor, v: Tensor) -> None:
        """Add φ(k) and values (B, K, n, D) to what the segment adds."""
        self.new_matrix += features.mT @ v
        self.new_norm += features.sum(2)

    def end_segment(self) -> None:
        """The segment becomes part of the memory."""
        for total, new in ((self.matrix, self.new_matrix), (self.norm, self.new_norm)):
            total += new
            new.zero_()
