"""What `variants.attention.long_short` keeps while a sequence is decoded.

Shapes: B batch, H heads, D channels of a head, l tokens of a segment, r rows of a segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from variants.base import Clock, DecodingState, Dims


class LongShortState(DecodingState):
    """A ring of the window, the rows of complete segments, and the tokens of the open one."""

    def __init__(
        self,
        dims: Dims,
        batch: int,
        max_len: int,
        sizes: tuple[int, int, int],
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(clock, max_len)
        window, self.rank, self.length = sizes
        held = min(self.length, max_len)

        def empty(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=device)

        ring = (dims.heads, min(window, max_len), dims.head_dim)
        rows = (dims.heads, max_len // self.length * self.rank, dims.head_dim)
        self.ring_keys, self.ring_values = empty(*ring), empty(*ring)
        self.row_keys, self.row_values = empty(*rows), empty(*rows)
        self.open_keys, self.open_values = empty(held, dims.inner_dim), empty(held, dims.inner_dim)
        self.logits = empty(held, dims.heads * self.rank)

    def write(
        self, position: int, k: Tensor, v: Tensor, raw_k: Tensor, raw_v: Tensor, logits: Tensor
    ) -> None:
        """Keep a token: k and v (B, H, 1, D) of the window, the others (B, 1, …) of its segment."""
        slot, at = position % self.ring_keys.shape[2], position % self.length
        self.ring_keys[:, :, slot : slot + 1], self.ring_values[:, :, slot : slot + 1] = k, v
        for held, new in ((self.open_keys, raw_k), (self.open_values, raw_v), (self.logits, logits)):
            held[:, at : at + 1] = new

    def write_prompt(
        self, k: Tensor, v: Tensor, raw_k: Tensor, raw_v: Tensor, logits: Tensor, *rows: Tensor
    ) -> None:
        """Keep n tokens from the first on: as `write`, but with n tokens, and keys and values (B, R, H, D) of
        the rows of all complete segments, if there are any."""
        tokens, ring = k.shape[2], self.ring_keys.shape[2]
        first = max(0, tokens - ring)
        slots = torch.arange(first, tokens, device=k.device) % ring
        self.ring_keys[:, :, slots] = k[:, :, first:].to(self.ring_keys.dtype)
        self.ring_values[:, :, slots] = v[:, :, first:].to(self.ring_values.dtype)
        rest = tokens % self.length
        for held, new in ((self.open_keys, raw_k), (self.open_values, raw_v), (self.logits, logits)):
            held[:, :rest] = new[:, tokens - rest :]
        for held, new in zip((self.row_keys, self.row_values), rows, strict=False):
            held[:, :, : new.shape[1]] = new.transpose(1, 2)

    def read(self, position: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values (B, H, n, D) that the token at a position reads, its own included."""
        visible = min(position + 1, self.ring_keys.shape[2])
        rows = position // self.length * self.rank
        keys = torch.cat([self.ring_keys[:, :, :visible], self.row_keys[:, :, :rows]], dim=2)
        values = torch.cat([self.ring_values[:, :, :visible], self.row_values[:, :, :rows]], dim=2)
        return keys.to(dtype), values.to(dtype)

    def open_segment(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, keys and values (B, 1, l, …) of the segment that ends."""
        return self.logits[:, None], self.open_keys[:, None], self.open_values[:, None]

    def close(self, position: int, k: Tensor, v: Tensor) -> None:
        """Keep the rows (B, r, H, D) of the segment that ends at a position."""
        first = position // self.length * self.rank
        self.row_keys[:, :, first : first + self.rank] = k.transpose(1, 2)
        self.row_values[:, :, first : first + self.rank] = v.transpose(1, 2)
