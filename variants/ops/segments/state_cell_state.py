"""What decoding keeps for a window of tokens and a recurrent cell of state vectors.

Shapes: B batch, S state vectors, C channels, K heads of keys, D channels of a head, W tokens of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import DecodingState
from variants.ops.key_cache import KeyCache


class BlockRecurrentState(DecodingState):
    """The keys and values of the window; the state vectors (B, S, C) and their keys and values (B, K, S, D);
    the keys without positions and the values of the open block (B, K, W − 1, D)."""

    def __init__(
        self, window: KeyCache, rows: int, like: tuple[int, int, int], vectors: int, width: int, keys: Tensor
    ) -> None:
        """`like` is (B, K, D); `keys` has the dtype and the device of keys."""
        super().__init__(window.clock, window.max_len)
        batch, heads, head_dim = like
        wide = torch.promote_types(keys.dtype, torch.float32)
        self.window = window
        self.vectors = keys.new_zeros(batch, vectors, width, dtype=wide)
        self.keys, self.values = (keys.new_zeros(batch, heads, vectors, head_dim) for _ in range(2))
        self.open_keys, self.open_values = (keys.new_zeros(batch, heads, rows, head_dim) for _ in range(2))

    def parts(self) -> list[KeyCache]:
        """The window."""
        return [self.window]
