"""Attention within the clusters of tokens, for `variants.attention.routing` (arXiv:2003.05997, §4.1).

Shapes: B batch, T tokens, H heads, D channels of a head, K clusters of a head, N = B · T · H rows; S slots of
a head, in n tiles of b queries and k keys each; D' ≥ D channels of a slot.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.tile_size import Sizes

MOST_PIECES = 16
"""Maximum number of slices; beyond it the slices grow, which bounds the number of operations."""
SLICE = Sizes(cpu=2**18, accelerator=2**26)
"""Scores within clusters computed at a time. On a CPU 1 MiB, because gathered rows and gradients, which are
larger, must stay in cache with them."""
ALIGNED = 4
"""Channels are padded to a multiple of this: 16 bytes in float32. Products of rows that are not aligned are
rounded in a way that depends on their address, and the address of a tile depends on later tokens."""
TILES = 4
"""Tiles of a cluster of mean size. More tiles compute fewer forbidden pairs, in smaller products."""


class Tiles(NamedTuple):
    """Division of the slots of each head into tiles of `size` queries.

    A tile's keys are its own slots, the `back` slots before them and the `ahead` slots after them.
    """

    size: int
    back: int
    ahead: int
    window: int
    is_causal: bool
    number: int
    """Tiles of a head."""
    step: int
    """Tiles computed at a time: a divisor of `number`, so that all products have the same sizes."""
    heads: int
    """Heads (of all sequences) computed at a time."""

    @property
    def keys(self) -> int:
        """Keys of a tile."""
        return self.back + self.size + self.ahead

    @property
    def slots(self) -> int:
        """Slots of a head."""
        return self.back + self.number * self.size + self.ahead


class Layout(NamedTuple):
    """Assignment of rows to slots, sorted by (sequence, head, cluster, position).

    Each cluster begins at the first slot of a tile, so a tile holds rows of one cluster of one sequence. The
    slot of a row within its tile is its rank in the cluster, modulo the size of a tile. It depends on earlier
    tokens only, and so do the slots of the keys before it. Later tokens therefore do not change the order of
    any sum, nor its rounding.
    """

    order: Tensor
    """(B·H, S) int64: the row in each slot; in an empty slot, the first row of the same head."""
    cluster: Tensor
    """(B·H, S) int32: the cluster of each slot's row; −1 in an empty slot."""
    slot: Tensor
    """(N,) int64: the slot of each row, among the slots of all heads."""
    tiles: Tiles


def _tiles(cluster: Tensor, clusters: int, window: int, *, is_causal: bool, device_type: str) -> Tiles:
    """Tiles that suffice for clusters of any sizes: their number depends only on shapes."""
    batch, heads, seq_len = cluster.shape
    if window >= seq_len:  # one tile of all tokens, in order of position
        window, size, back, count = seq_len, seq_len, 0, 1
    else:
        size = -(-min(window, max(1, seq_len // clusters)) // TILES)
        back = -(-(window - 1) // size) * size
        # the last tile of each cluster that is not empty holds at least one row
        count = (seq_len + min(clusters, seq_len) * (size - 1)) // size
    ahead = 0 if is_causal else back
    scores = count * size * (back + size + ahead)
    most = max(SLICE.on(device_type), -(-batch * heads * scores // MOST_PIECES))
    parts = -(-scores // most)
    step = -(-count // parts)
    count = -(-count // step) * step
    return Tiles(size, back, ahead, window, is_causal, count, step, max(1, most // scores))


def _slots(cluster: Tensor, clusters: int, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """The fields `order`, `cluster` and `slot` of a Layout."""
    batch, heads, seq_len = cluster.shape
    device = cluster.device
    position = torch.arange(seq_len, device=device)
    slot = position.expand_as(cluster)
    if tiles.window < seq_len:
        size = torch.zeros(batch, heads, clusters, dtype=torch.int64, device=device)
        size.scatter_add_(-1, cluster, torch.ones_like(cluster))
        by_cluster, order = cluster.sort(dim=-1, stable=True)
        rank = position - (size.cumsum(-1) - size).gather(-1, by_cluster)
        needed = (size + tiles.size - 1) // tiles.size
        first = (needed.cumsum(-1) - needed) * tiles.size
        slot = torch.empty_like(cluster).scatter_(-1, order, first.gather(-1, by_cluster) + rank)
    slot = slot + tiles.back
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1)
    first_row = head // heads * (seq_len * heads) + head % heads  # rows are numbered as (B, T, H)
    rows = first_row.expand(batch, heads, tiles.slots).clone()
    rows.scatter_(-1, slot, first_row + position * heads)
    kinds = torch.full((batch, heads, tiles.slots), -1, dtype=torch.int32, device=device)
    kinds.scatter_(-1, slot, cluster.int())
    slot = (slot + head * tiles.slots).transpose(1, 2)
    return rows.flatten(0, 1), kinds.flatten(0, 1), slot.flatten()


# torch 2.13's inductor may fuse a read of `slot` into a loop that runs before the scatter that fills it
_slots_operator = operator(
    "cluster_slots",
    lambda cluster, clusters, tiles: _slots(cluster, clusters, Tiles._make(tiles)),
    schema="(Tensor cluster, SymInt clusters, SymInt[] tiles) -> (Tensor, Tensor, Tensor)",
)


@_slots_operator.register_fake
def _slots_shapes(cluster: Tensor, clusters: int, tiles: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _ = cluster.shape
    order = cluster.new_empty(batch * heads, Tiles._make(tiles).slots)
    return order, torch.empty_like(order, dtype=torch.int32), cluster.new_empty(cluster.numel())


@torch.no_grad()
@repeatable
def lay_out(
    cluster: Tensor, clusters: int, window: int, *, is_causal: bool, device_type: str | None = None
) -> Layout:
    """Lay out the rows so that each token reads a window of slots: the last `window` members of its cluster.

    `cluster` (B, H, T) is the cluster of each token. `device_type` decides the size of the slices; None: the
    device of `cluster`.
    """
    kind = device_type or cluster.device.type
    tiles = _tiles(cluster, clusters, window, is_causal=is_causal, device_type=kind)
    if torch.compiler.is_compiling():
        order, kinds, slot = _slots_operator(cluster, clusters, list(tiles))
    else:  # operation by operation, so that counters see all computation and memory
        order, kinds, slot = _slots(cluster, clusters, tiles)
    return Layout(order, kinds, slot, tiles)


def _slices(tiles: Tiles, heads: int) -> list[tuple[slice, slice]]:
    """(heads, tiles) computed at a time."""
    return [
        (slice(head, min(head + tiles.heads, heads)), slice(tile, tile + tiles.step))
        for head in range(0, heads, tiles.heads)
        for tile in range(0, tiles.number, tiles.step)
    ]


class _Slice:
    """Some tiles of g heads: their slots, and the attention weights of their queries."""

    def __init__(self, layout: Layout, heads: slice, tiles: slice) -> None:
        self.tiles = layout.tiles
        size, back, ahead = self.tiles[:3]
        self.key_slots = slice(tiles.start * size, tiles.stop * size + back + ahead)
        """The L slots of keys in each head."""
        self.query_slots = slice(back, self.key_slots.stop - self.key_slots.start - ahead)
        """The slots of queries among them."""
        self.order = layout.order[heads, self.key_slots]
        self.cluster = layout.cluster[heads, self.key_slots]

    def rows(self, x: Tensor) -> Tensor:
        """Gather the rows of x (N, D) into slots (g, L, D'), in float32 or wider."""
        rows = x.index_select(0, self.order.flatten()).unflatten(0, self.order.shape)
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        padding = _width(x) - x.shape[-1]
        return F.pad(rows, (0, padding)) if padding else rows

    def queries(self, slots: Tensor) -> Tensor:
        """(g, L, …) → the queries of each tile (g, n, b, …), a view."""
        tiles: Tensor = slots[:, self.query_slots].unflatten(1, (-1, self.tiles.size))
        return tiles

    def keys(self, slots: Tensor) -> Tensor:
        """(g, L, …) → the keys of each tile (g, n, k, …), a view."""
        return slots.unfold(1, self.tiles.keys, self.tiles.size).movedim(-1, 2)

    def add_keys(self, slots: Tensor, keys: Tensor) -> None:
        """The transpose of `keys`: add to each slot (g, L, D') its gradients from all tiles (g, n, k, D')."""
        parts = keys.unflatten(2, (-1, self.tiles.size)).unbind(2)  # (g, n, b, D) each
        by_tile = slots.unflatten(1, (-1, self.tiles.size))
        for i, part in enumerate(parts):
            by_tile[:, i : i + part.shape[1]] += part

    def forbidden(self) -> Tensor:
        """(g, n, b, k) bool: the pairs that the window forbids. Queries in empty slots read empty slots."""
        size, back, _, window, is_causal, *_ = self.tiles
        slot = torch.arange(self.tiles.keys, device=self.cluster.device)
        distance = slot[back : back + size, None] - slot
        outside = distance.abs() >= window
        if is_causal:
            outside |= distance < 0
        of_query, of_key = self.queries(self.cluster), self.keys(self.cluster)
        if back:  # a tile holds one cluster, that of its first row; its empty slots read the same keys
            of_query = of_query[..., :1]
        return (of_query[..., None] != of_key[:, :, None]) | outside

    def attended(self, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute attention weights from rows qk and v (N, D).

        Returns the weights (g, n, b, k), exactly 0 where forbidden; queries (g, n, b, D'), divided by √D;
        keys and values (g, n, k, D'). A value that is not finite would reach queries that give it the weight
        0. It is therefore replaced by 0, and its key by NaN, which reaches only queries that may read it.
        """
        rows, values = self.rows(qk), self.rows(v)
        rows[..., 0] += (values * 0).sum(dim=-1)
        values = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        q, k = self.queries(rows) * qk.shape[-1] ** -0.5, self.keys(rows)
        weights = (q @ k.mT).masked_fill_(self.forbidden(), -math.inf).softmax(dim=-1)
        return weights, q, k, self.keys(values)


@repeatable
class Windowed(torch.autograd.Function):
    """Softmax attention of each row to the rows of its cluster in its window.

    Shared queries and keys, and values (B, T, H, D) → (B, T, H, D). Saves only its inputs; backward gathers
    rows and computes scores again, slice by slice. Products are float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Compute outputs by slots, slice by slice, then gather them in the order of rows."""
        ctx.save_for_backward(qk, v, *layout[:3])
        ctx.tiles = layout.tiles
        flat = qk.reshape(-1, qk.shape[-1]), v.reshape(-1, v.shape[-1])
        y = v.new_empty(*layout.order.shape, _width(v))
        with torch.autocast(v.device.type, enabled=False):
            for heads, tiles in _slices(layout.tiles, y.shape[0]):
                here = _Slice(layout, heads, tiles)
                weights, _, _, values = here.attended(*flat)
                here.queries(y[heads, here.key_slots]).copy_(weights @ values)
        return _by_row(y, layout, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """Add up the gradients of each slice by slots, then gather them; those of empty slots are ignored."""
        qk, v, order, cluster, slot = ctx.saved_tensors
        layout = Layout(order, cluster, slot, ctx.tiles)
        flat_qk, flat_v, flat_dy = (t.reshape(-1, t.shape[-1]) for t in (qk, v, dy))
        wide = torch.promote_types(v.dtype, torch.float32)
        dqk, dv = (v.new_zeros(*order.shape, _width(v), dtype=wide) for _ in range(2))
        with torch.autocast(v.device.type, enabled=False):
            for heads, tiles in _slices(layout.tiles, order.shape[0]):
                here = _Slice(layout, heads, tiles)
                _add_gradients(here, flat_qk, flat_v, flat_dy, dqk[heads], dv[heads])
        dqk = _by_row(dqk, layout, qk)
        return dqk, _by_row(dv, layout, v), None


def _width(x: Tensor) -> int:
    """D': channels of a slot that holds a row of x (…, D)."""
    return -(-x.shape[-1] // ALIGNED) * ALIGNED


def _by_row(slots: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """(B·H, S, D') → (B, T, H, D), with the shape and dtype of `like`."""
    rows = slots.flatten(0, 1)[:, : like.shape[-1]].index_select(0, layout.slot)
    return rows.view(like.shape).to(like.dtype)


def _add_gradients(here: _Slice, qk: Tensor, v: Tensor, dy: Tensor, dqk: Tensor, dv: Tensor) -> None:
    """Add the contribution of the queries of a slice to dqk and dv of its heads, (g, S, D') each.

    A function, so that the temporaries of a slice are freed before the next slice.
    """
    weights, q, k, values = here.attended(qk, v)
    dqk, dv = dqk[:, here.key_slots], dv[:, here.key_slots]
    dy_queries = here.queries(here.rows(dy) * (here.cluster >= 0)[..., None])
    here.add_keys(dv, weights.mT @ dy_queries)
    d_scores = torch.ops.aten._softmax_backward_data(dy_queries @ values.mT, weights, -1, weights.dtype)
    here.queries(dqk).add_(d_scores @ k, alpha=qk.shape[-1] ** -0.5)
    here.add_keys(dqk, d_scores.mT @ q)
