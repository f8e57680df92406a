"""Pairs of a query and a block of keys, sorted by block: the layout of `routed_blocks`.

Shapes: N sequences of one head of keys, T tokens, b tokens of a block, F full blocks of a sequence, K picks
of a query, P pairs (query, pick) of a sequence, S slots of a sequence, in tiles of `size`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator

TILE = 128
"""Maximum number of queries of a tile."""
PADDING = 4
"""A block has so many tiles if all blocks are selected equally often; the last one may hold empty slots."""
ALIGNED = 8
"""The size of a tile is a multiple of this, so that the rounding of a row does not depend on its address."""


class Plan(NamedTuple):
    """What is computed, and how."""

    block: int
    starts: tuple[int, ...]
    """Pick j exists for the queries from token starts[j] on."""
    impl: str
    """One of `KERNELS`."""
    device_type: str

    def pairs(self, seq_len: int) -> int:
        """P: pairs of a query and a pick."""
        return sum(max(0, seq_len - start) for start in self.starts)


class Tiles(NamedTuple):
    """The tiles of one sequence."""

    size: int
    """Queries of a tile."""
    number: int

    @property
    def slots(self) -> int:
        """S."""
        return self.size * self.number


def tiles_of(seq_len: int, plan: Plan) -> Tiles:
    """Tiles that suffice for any selection."""
    pairs, full = plan.pairs(seq_len), seq_len // plan.block
    if not pairs:
        return Tiles(ALIGNED, 0)
    size = min(TILE, max(ALIGNED, pairs // (full * PADDING) // ALIGNED * ALIGNED))
    # the last tile of each block that is selected holds at least one pair
    return Tiles(size, (pairs + min(full, pairs) * (size - 1)) // size)


class Layout(NamedTuple):
    """Assignment of pairs to slots, sorted by (sequence, block, query).

    The slot of a query within its tile is its rank among the queries of the block, modulo the size of a tile.
    It depends on earlier tokens only, so later tokens do not change the rounding of a result.
    """

    query: Tensor
    """(N, S) int64: the query of each slot; −1 in an empty slot."""
    block: Tensor
    """(N, tiles) int64: the block of keys of each tile."""
    slot: Tensor
    """(N, T, K) int64: the slot of each pick; S for a pick that does not exist."""


def _lay_out(picks: Tensor, starts: list[int], full: int, size: int, number: int) -> Layout:
    """See `Layout`; picks (N, T, K) are blocks in [0, full)."""
    (sequences, seq_len, width), device = picks.shape, picks.device
    slots = size * number
    places = [torch.arange(start, seq_len, device=device) * width + j for j, start in enumerate(starts)]
    place = torch.cat(places)  # (P,): of the pairs that exist, among all T · K
    pair_query = torch.div(place, width, rounding_mode="floor")
    key = picks.flatten(1)[:, place] * seq_len + pair_query
    key, order = key.sort(-1)  # no two keys are equal: a query selects a block once
    block = torch.div(key, seq_len, rounding_mode="floor")
    count = torch.zeros(sequences, full, dtype=torch.int64, device=device)
    count.scatter_add_(1, block, torch.ones_like(block))
    needed = torch.div(count + (size - 1), size, rounding_mode="floor")
    last = needed.cumsum(1)
    rank = torch.arange(len(place), device=device) - (count.cumsum(1) - count).gather(1, block)
    slot = (last - needed).gather(1, block) * size + rank
    query = torch.full((sequences, slots), -1, dtype=torch.int64, device=device)
    query.scatter_(1, slot, key - block * seq_len)
    tile = torch.arange(number, device=device).expand(sequences, -1).contiguous()
    of_tile = torch.searchsorted(last, tile, right=True).clamp_(max=full - 1)
    back = torch.full((sequences, seq_len * width), slots, dtype=torch.int64, device=device)
    back.scatter_(1, place[order], slot)
    return Layout(query, of_tile, back.view(picks.shape))


# one operator for torch.compile, whose inductor may fuse a read of an index with the scatter that fills it
_layout_operator = operator(
    "routed_blocks_layout",
    lambda *args: tuple(_lay_out(*args)),
    schema="(Tensor picks, int[] starts, SymInt full, SymInt size, SymInt number)"
    " -> (Tensor, Tensor, Tensor)",
)


@_layout_operator.register_fake
def _layout_shapes(
    picks: Tensor, starts: list[int], full: int, size: int, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    sequences = picks.shape[0]
    return (
        picks.new_empty(sequences, size * number),
        picks.new_empty(sequences, number),
        picks.new_empty(picks.shape),
    )


@torch.no_grad()
@repeatable
def lay_out(picks: Tensor, plan: Plan) -> Layout:
    """The layout of the picks (N, T, K)."""
    seq_len = picks.shape[1]
    if not plan.pairs(seq_len):
        return Layout(picks.flatten(1), picks.flatten(1), picks)  # all empty
    sizes = list(plan.starts), seq_len // plan.block, *tiles_of(seq_len, plan)
    if torch.compiler.is_compiling():
        return Layout(*_layout_operator(picks, *sizes))
    return _lay_out(picks, *sizes)
