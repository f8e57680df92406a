"""What a window of tokens and a window of pools keep while a sequence is decoded.

Shapes: B batch, n tokens or pools, H heads, D channels of a head, C' = H · D, s tokens of a pool, m pools of
the ring.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import Clock, DecodingState
from variants.ops.key_cache import KeyCache


class PooledState(DecodingState):
    """The cache of the window, a ring of the last pools (B, H, m, D), and the tokens of the open pool
    (B, s, C')."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        window: KeyCache,
        ring: tuple[int, int, int, int],
        pool: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`ring` is (B, H, m, D); `pool` is s."""
        super().__init__(clock, max_len)
        batch, heads, _, head_dim = ring
        self.window = window
        self.keys, self.values = (torch.zeros(ring, dtype=dtype, device=device) for _ in range(2))
        self.open = torch.zeros(batch, min(pool, max_len), heads * head_dim, dtype=dtype, device=device)

    def parts(self) -> tuple[DecodingState, ...]:
        """The cache of the window."""
        return (self.window,)

    def read(self, q: Tensor, pool: int) -> Tensor:
        """Attention of the queries (B, H, n, D) of one pool to the pools before it: (B, H, n, D).

        0 without any. The order of the ring does not matter, because positions are in the keys.
        """
        visible = min(pool, self.keys.shape[2])
        if not visible:
            return torch.zeros_like(q)
        keys, values = (t[:, :, :visible].to(q.dtype) for t in (self.keys, self.values))
        return F.scaled_dot_product_attention(q, keys, values)

    def keep(self, k: Tensor, v: Tensor, first: int) -> None:
        """Keep the keys and values (B, H, n, D) of complete pools, n ≤ m, from pool `first` on."""
        slots = torch.arange(first, first + k.shape[2], device=k.device) % self.keys.shape[2]
        self.keys[:, :, slots] = k.to(self.keys.dtype)
        self.values[:, :, slots] = v.to(self.values.dtype)
