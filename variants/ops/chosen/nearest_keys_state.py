"""What decoding keeps for attention to the nearest keys of earlier segments.

Shapes: B batch, K heads of keys, n tokens of a step, D channels of a head, s tokens of a segment, M keys
of the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Clock, DecodingState


class MemorizingState(DecodingState):
    """Keys and values (B, K, M + s, D) of the memory and then of the open segment, and its rotated keys."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int],
        sizes: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, D); `sizes` are those of a segment and of the memory."""
        super().__init__(clock, max_len)
        batch, heads, channels = shape
        segment, self._most = sizes[0], (sizes[1],)
        self.keys, self.values = (
            torch.zeros(batch, heads, min(max_len, sum(sizes)), channels, dtype=dtype, device=device)
            for _ in range(2)
        )
        self.turned = torch.zeros(batch, heads, min(max_len, segment), channels, dtype=dtype, device=device)
        self.before = 0
        """Tokens of the memory."""
        self.segment = 0
        """Tokens of the open segment."""

    def memory(self) -> tuple[Tensor, Tensor]:
        """The keys and values of the memory."""
        return self.keys[:, :, : self.before], self.values[:, :, : self.before]

    def append(self, k: Tensor, v: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Add tokens to the segment; return its rotated keys and its values."""
        first = self.segment
        self.segment += k.shape[2]
        place = slice(self.before + first, self.before + self.segment)
        self.keys[:, :, place], self.values[:, :, place] = k, v
        self.turned[:, :, first : self.segment] = turned
        return (
            self.turned[:, :, : self.segment],
            self.values[:, :, self.before : self.before + self.segment],
        )

    def end_segment(self) -> None:
        """The segment becomes part of the memory, of which the last tokens stay."""
        tokens = self.before + self.segment
        dropped = max(0, tokens - self._most[0])
        if dropped:
            for kept in (self.keys, self.values):
                kept[:, :, : tokens - dropped] = kept[:, :, dropped:tokens].clone()
        self.before, self.segment = tokens - dropped, 0

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.before = self.segment = 0
