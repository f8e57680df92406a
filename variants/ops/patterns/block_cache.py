"""Keys and values for decoding attention to global, neighbouring and random blocks.

Shapes: B batch, H heads, D channels of a head, S slots, K keys of a query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import Clock
from variants.ops.key_cache import KeyCache
from variants.ops.patterns import masks
from variants.ops.patterns.random_blocks import BlockRule


class BlockCache(KeyCache):
    """All keys, because any of them may be read later; a single query gathers the blocks that it reads."""

    def __init__(
        self,
        rule: BlockRule,
        shape: tuple[int, int, int],
        max_len: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`rule` is that of a causal model; `shape` is (B, H, D)."""
        super().__init__(rule & masks.causal, shape, max_len, clock=clock, dtype=dtype, device=device)
        self.blocks = rule

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `KeyCache.attend`."""
        position, block = self.clock.position, self.blocks.block
        row = position // block
        if q.shape[2] > 1 or row < self.blocks.dense_rows(position + 1):
            return super().attend(q, k, v)
        self.write(k, v)
        (group,) = self.groups
        slots = self.blocks.earlier_blocks(row, q.shape[1], q.device)  # (H, S)
        tokens = slots[..., None] * block + torch.arange(block, device=q.device)
        own = torch.arange(row * block, position + 1, device=q.device)
        chosen = torch.cat([tokens.flatten(1), own.expand(q.shape[1], -1)], dim=1)  # (H, K)
        head = torch.arange(q.shape[1], device=q.device)[:, None]
        keys, values = (
            kept[:, head, chosen].to(q.dtype) for kept in (group.summary_keys, group.summary_values)
        )
        return F.scaled_dot_product_attention(q, keys, values)
