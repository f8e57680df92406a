"""What decoding keeps for a layer with a memory of its own earlier inputs.

Shapes: B batch, C channels, H heads, K heads of keys, D channels of a head, J keys, F positions that leave
the memory.

The papers keep hidden states, and compute keys and values of the whole memory for every segment. To compute
them for every token would cost as much as a segment. So here keys and values are kept. They are in the order
of their positions: compressed memories, memory, and the segment so far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from variants.base import Clock, DecodingState


class RecurrentState(DecodingState):
    """Keys and values of compressed memories, memory and segment."""

    constants = ("positions",)

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        positions: Tensor,
        dtype: torch.dtype,
    ) -> None:
        """`shape` is (K, B, J, D) for the largest J; `positions` (H, D, J + 1) are those of the layer."""
        super().__init__(clock, max_len)
        self.kv = torch.zeros(2, *shape, dtype=dtype, device=positions.device)
        self.positions = positions
        self.before = 0
        """Keys before the segment."""
        self.segment = 0
        """Tokens of the segment so far."""

    @property
    def keys(self) -> int:
        """Keys so far."""
        return self.before + self.segment

    def append(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (2, K, B, n, D); return all of them, and their positions (H, D, J + 1)."""
        tokens = kv.shape[3]
        self.kv[:, :, :, self.keys : self.keys + tokens] = kv
        self.segment += tokens
        farthest = self.positions.shape[-1] - 1
        return self.kv[:, :, :, : self.keys], self.positions[:, :, farthest - self.keys :]

    def forget(self, dropped: int, start: int = 0) -> None:
        """End the segment: `dropped` keys from key `start` on are forgotten, those after them move up."""
        if dropped:
            kept = self.kv[:, :, :, start + dropped : self.keys].clone()
            self.kv[:, :, :, start : start + kept.shape[3]] = kept
        self.before, self.segment = self.keys - dropped, 0

    def insert(self, kv: Tensor, *, at: int, limit: int) -> None:
        """Insert keys and values (2, K, B, n, D) at key `at`; of those up to there, the last `limit` stay."""
        tokens = kv.shape[3]
        first = max(0, at + tokens - limit)  # of the keys before `at` that stay
        after = self.kv[:, :, :, at : self.keys].clone()
        stay = self.kv[:, :, :, first:at].clone()
        end = stay.shape[3] + tokens
        self.kv[:, :, :, : stay.shape[3]] = stay
        self.kv[:, :, :, stay.shape[3] : end] = kv
        self.kv[:, :, :, end : end + after.shape[3]] = after
        self.before += tokens - first

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.before = self.segment = 0


class CompressiveState(DecodingState):
    """The keys and values, and the hidden states of the memory and of the segment."""

    def __init__(self, keys: RecurrentState, hidden: Tensor, usage: Tensor | None) -> None:
        """`hidden` is (B, J, C); `usage` (B, J) is the attention that each has received, or None."""
        super().__init__(keys.clock, keys.max_len)
        self.keys, self.hidden, self.usage = keys, hidden, usage
        self.held = 0
        """Positions of memory and segment so far."""

    def parts(self) -> Sequence[DecodingState]:
        """The keys and values."""
        return (self.keys,)

    def hold(self, x: Tensor, received: Tensor | None) -> None:
        """Add the tokens x (B, n, C) of the segment, and what all keys received from them (B, keys)."""
        self.hidden[:, self.held : self.held + x.shape[1]] = x
        self.held += x.shape[1]
        if self.usage is not None and received is not None:
            self.usage[:, : self.held] += received[:, received.shape[1] - self.held :]

    def drop(self, fallen: int) -> None:
        """Forget the oldest positions."""
        if not fallen:
            return
        for kept in (self.hidden, self.usage):
            if kept is not None:
                kept[:, : self.held - fallen] = kept[:, fallen : self.held].clone()
                kept[:, self.held - fallen : self.held] = 0
        self.held -= fallen

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.held = 0
