"""Selection of blocks of keys by their means, and what decoding keeps for it.

Shapes: B batch, H heads, K heads of keys, T tokens, n tokens of a step, D channels of a head, b tokens of a
block, F full blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from variants.base import Clock, DecodingState
from variants.ops.tile_size import Sizes

SCORES = Sizes(cpu=2**19, accelerator=2**28)
"""Scores of queries and blocks computed at a time."""
MOST_PIECES = 64
"""Maximum number of pieces of queries; beyond it the pieces grow, which bounds the number of operations."""


def block_means(k: Tensor, block: int) -> Tensor:
    """The mean keys of the full blocks: (B, K, T, D) → (B, K, F, D), rounded to the dtype of the keys."""
    full = k.shape[2] // block
    return k[:, :, : full * block].unflatten(2, (full, block)).mean(3) if full else k[:, :, :0]


def pieces(tokens: int, scores: int, device_type: str) -> Iterator[slice]:
    """Pieces of the queries; `scores` is the largest number of scores of one query, of all sequences."""
    step = max(1, SCORES.on(device_type) // max(1, scores), -(-tokens // MOST_PIECES))
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


@torch.no_grad()
def best_blocks(
    q: Tensor, means: Tensor, block: int, count: int, device_type: str, *, start: int = 0
) -> Tensor:
    """The blocks before its own whose means have the largest products with a query: (B, H, n, count), best
    first.

    The queries (B, H, n, D) are the tokens from `start` on; `means` (B, H, F, D). A query with fewer past
    blocks has the number F in place of the others. Scores are float32 or wider, because they decide what is
    read. The means of the own block and of later blocks are masked before the selection.
    """
    batch, heads, tokens, _ = q.shape
    picks = torch.full((batch, heads, tokens, count), means.shape[2], dtype=torch.int64, device=q.device)
    if not count:
        return picks
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        for piece in pieces(tokens, batch * heads * means.shape[2], device_type):
            visible = (start + piece.stop - 1) // block  # blocks before that of the last query
            if not visible:
                continue
            scores = q[:, :, piece].to(wide) @ means[:, :, :visible].to(wide).mT
            own = torch.arange(start + piece.start, start + piece.stop, device=q.device)[:, None] // block
            past = torch.arange(visible, device=q.device) < own
            found = scores.masked_fill_(~past, -math.inf).topk(min(count, visible))
            there = torch.arange(min(count, visible), device=q.device) < own
            picks[:, :, piece, : there.shape[1]] = found.indices.masked_fill_(~there, means.shape[2])
    return picks


def candidate_pairs(seq_len: int, block: int) -> int:
    """Pairs of a query and a block before its own."""
    full, rest = divmod(seq_len, block)
    return block * full * (full - 1) // 2 + rest * full


def own_pairs(seq_len: int, block: int) -> int:
    """Pairs of a query and a key of its own block, not after the query."""
    full, rest = divmod(seq_len, block)
    return full * block * (block + 1) // 2 + rest * (rest + 1) // 2


class BlockMeans(DecodingState):
    """All keys and values (B, K, max_len, D), and the mean keys (B, K, F, D) of complete blocks."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        max_len: int,
        blocks: int,
        block: int,
        *,
        clock: Clock,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, K, D)."""
        super().__init__(clock, max_len)
        batch, heads, channels = shape
        self.keys, self.values = (
            torch.zeros(batch, heads, max_len, channels, dtype=dtype, device=device) for _ in range(2)
        )
        self.means = torch.zeros(batch, heads, blocks, channels, dtype=dtype, device=device)
        self._sizes = (block,)

    def write(self, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values (B, K, n, D) of the next tokens, and the means of blocks that they end."""
        begin, (block,) = self.clock.position, self._sizes
        end = begin + k.shape[2]
        self.keys[:, :, begin:end], self.values[:, :, begin:end] = k, v
        first, last = begin // block, min(end // block, self.means.shape[2])
        if first < last:
            self.means[:, :, first:last] = block_means(self.keys[:, :, first * block : last * block], block)

    def of_blocks(self, picks: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (B, H, keys, D) of the picked blocks (B, H, picks), and of the own block up to
        the current token."""
        (block,), position = self._sizes, self.clock.position
        batch, heads, _ = picks.shape
        tokens = (picks[..., None] * block + torch.arange(block, device=picks.device)).flatten(2)
        own = torch.arange(position // block * block, position + 1, device=picks.device)
        chosen = torch.cat([tokens, own.expand(batch, heads, -1)], dim=2)
        sequence = torch.arange(batch, device=picks.device)[:, None, None]
        head = torch.arange(heads, device=picks.device)[:, None] // (heads // self.keys.shape[1])
        return self.keys[sequence, head, chosen], self.values[sequence, head, chosen]
