"""The tiles of a sorted order that FlexAttention computes, from the sizes alone."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.fused.backends import BLOCK, MASKS
from variants.ops.lsh.windows import Window


class Tiles(NamedTuple):
    """The key tiles that each tile of queries reads, and the reverse, as FlexAttention wants them."""

    keys: Tensor
    """(1, 1, tiles) int32: the number of key tiles."""
    key_index: Tensor
    """(1, 1, tiles, most) int32: their indices; arbitrary ones beyond their number."""
    queries: Tensor
    query_index: Tensor


@lru_cache(maxsize=MASKS)
def key_tiles(window: Window, positions: int) -> list[tuple[int, int]]:
    """The first and the last key tile that each tile of queries reads."""
    found = []
    for first in range(0, positions, BLOCK):
        low, high = window.span(first)[0], window.span(first + BLOCK - 1)[1] - 1
        found.append((max(low, 0) // BLOCK, min(high, positions - 1) // BLOCK))
    return found


@lru_cache(maxsize=MASKS)
def tiles(window: Window, positions: int, device: torch.device) -> Tiles:
    """The tiles of a sequence with this number of positions."""
    low, high = torch.tensor(key_tiles(window, positions), device=device).T.contiguous()
    tile = torch.arange(len(low), device=device)
    # both grow with the tile of queries, so that the queries of a key tile are a range too
    first, last = torch.searchsorted(high, tile), torch.searchsorted(low, tile, right=True) - 1

    def ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        number = last - first + 1
        index = first[:, None] + torch.arange(int(number.max()), device=device)
        return number.int()[None, None], index.clamp(max=len(low) - 1).int()[None, None]

    return Tiles(*ranges(low, high), *ranges(first, last))
