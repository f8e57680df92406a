"""Spherical k-means over tokens, and attention within its clusters, for `variants.attention.routing`.

Shapes: B batch, T tokens, H heads, D channels a head, K clusters a head, w members of a cluster,
N = B · T · H rows; S slots of a head, in n tiles of b queries and k keys each; D' ≥ D channels of a slot.

Whatever decides who belongs to which cluster is float32, whatever the model's dtype, and works in
pieces: T × K scores would be 8 GiB at a million tokens.
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

PIECE = Sizes(cpu=2**21, accelerator=2**24)
"""Scores held at a time: 8 MiB, so that a piece is made, used and overwritten in cache."""
MOST_PIECES = 16
"""Beyond them pieces grow instead, by 1/16 of what would be held at once."""
SLICE = Sizes(cpu=2**18, accelerator=2**23)
"""Scores within clusters held at a time: 1 MiB, because what they are made of and made into is larger."""
ALIGNED = 4
"""Channels are filled up to a multiple, 16 bytes in float32. Products of rows that are not aligned so round
in a way that depends on their address, and where a tile lies depends on later tokens."""
TILES = 4
"""Tiles a cluster of mean size has: more of them compute fewer forbidden pairs, in smaller products."""
EPSILON = 1e-5
"""Of the layer normalisation, as torch has it."""


def unit(x: Tensor) -> Tensor:
    """Layer normalisation without scale or bias: on the sphere of radius √D. float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], eps=EPSILON)


@torch.no_grad()
@repeatable
def nearest(x: Tensor, centroids: Tensor, device_type: str | None = None) -> tuple[Tensor, Tensor]:
    """The cluster of each token, and each cluster's sum of members.

    (B, T, H, D) and (H, K, D) → (B, H, T) int64, (H, K, D). The cluster is the one whose centroid has
    the largest dot product with the normalised token; of equals, the one with the lowest index.
    The work is cut for a type of device; None: that of x.
    """
    batch, seq_len, heads, head_dim = x.shape
    clusters = centroids.shape[1]
    sums = torch.zeros(heads, clusters, head_dim, device=x.device)
    head = torch.arange(heads, device=x.device)[:, None]
    wanted = PIECE.on(device_type or x.device.type) // (batch * heads * clusters)
    length = max(1, wanted, -(-seq_len // MOST_PIECES))
    found = []
    with torch.autocast(x.device.type, enabled=False):  # half precision would change memberships
        for piece in x.split(length, dim=1):
            content = unit(piece.float()).transpose(1, 2)  # (B, H, p, D)
            cluster = (content @ centroids.float().transpose(1, 2)).max(dim=-1).indices
            found.append(cluster)
            # index_put_ adds in one order on every device; index_add_ on a GPU does not
            sums.index_put_((head, cluster), content, accumulate=True)
    return (found[0] if len(found) == 1 else torch.cat(found, dim=2)), sums


@torch.no_grad()
@repeatable
def members(
    x: Tensor, centroids: Tensor, count: int, device_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """The `count` tokens with the largest dot product with each centroid, in order of position, and
    what `nearest` gives as sums.

    (B, T, H, D) and (H, K, D) → (B, H, K, w) int64, (H, K, D). Of equal tokens the earliest are taken.
    """
    batch, seq_len, heads, _ = x.shape
    position = torch.arange(seq_len, device=x.device)
    found = []
    best = torch.full((batch, heads, seq_len), -math.inf, device=x.device)
    cluster = torch.zeros_like(best, dtype=torch.int64)
    seen = 0
    with torch.autocast(x.device.type, enabled=False):
        content = unit(x.float()).transpose(1, 2)  # (B, H, T, D)
        wanted = PIECE.on(device_type or x.device.type) // (batch * heads * seq_len)
        some = max(1, wanted, -(-centroids.shape[1] // MOST_PIECES))
        for piece in centroids.float().split(some, dim=1):
            scores = piece @ content.transpose(2, 3)  # (B, H, k, T)
            least = scores.topk(count, dim=-1).values[..., -1:]
            above, equal = scores > least, scores == least
            wanted = count - above.sum(dim=-1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(dim=-1) <= wanted))
            # the i-th chosen token goes to slot i, every other to a slot that is dropped
            slot = torch.where(chosen, chosen.cumsum(dim=-1) - 1, count)
            into = slot.new_zeros(*slot.shape[:-1], count + 1)
            found.append(into.scatter_(-1, slot, position.expand_as(slot))[..., :count])
            nearest_here = scores.max(dim=2)
            nearer = nearest_here.values > best
            best = torch.where(nearer, nearest_here.values, best)
            cluster = torch.where(nearer, nearest_here.indices + seen, cluster)
            seen += piece.shape[1]
    sums = torch.zeros_like(centroids, dtype=torch.float32)
    sums.index_put_((torch.arange(heads, device=x.device)[:, None], cluster), content, accumulate=True)
    return torch.cat(found, dim=2), sums


class Tiles(NamedTuple):
    """How the slots of every head are cut. A tile of `size` queries is given the slots from `back` before
    its first to `ahead` after its last."""

    size: int
    back: int
    ahead: int
    window: int
    is_causal: bool
    number: int
    """Tiles of a head."""
    step: int
    """Tiles to work on at a time: a divisor of `number`, so that every product has the same sizes."""
    heads: int
    """Heads (of all sequences) to work on at a time."""

    @property
    def keys(self) -> int:
        """Slots that a tile is given."""
        return self.back + self.size + self.ahead

    @property
    def slots(self) -> int:
        """Slots of a head."""
        return self.back + self.number * self.size + self.ahead


class Layout(NamedTuple):
    """A slot for every row, by (sequence, head, cluster, position), each cluster from a tile's first slot on.

    A row's slot within its tile is its rank in its cluster, modulo the size of a tile, and so are those of
    the keys before it. Both depend on earlier tokens alone, so that sums are taken, and round, in the same
    way whatever comes later. Tiles hold rows of one cluster of one sequence.
    """

    order: Tensor
    """(B·H, S) int64: the row in each slot; in an empty one, the first row of the same head."""
    cluster: Tensor
    """(B·H, S) int32: the cluster of each slot's row; −1 in an empty slot."""
    slot: Tensor
    """(N,) int64: the slot of each row, among those of all heads."""
    tiles: Tiles


def _tiles(cluster: Tensor, clusters: int, window: int, *, is_causal: bool, device_type: str) -> Tiles:
    """Tiles for clusters of any sizes: their number follows from shapes."""
    batch, heads, seq_len = cluster.shape
    if window >= seq_len:  # one tile of all tokens, in order of position
        window, size, back, count = seq_len, seq_len, 0, 1
    else:
        size = -(-min(window, max(1, seq_len // clusters)) // TILES)
        back = -(-(window - 1) // size) * size
        # each cluster that is not empty may leave all but one of the slots of its last tile empty
        count = (seq_len + min(clusters, seq_len) * (size - 1)) // size
    ahead = 0 if is_causal else back
    scores = count * size * (back + size + ahead)
    most = max(SLICE.on(device_type), -(-batch * heads * scores // MOST_PIECES))
    parts = -(-scores // most)
    step = -(-count // parts)
    count = -(-count // step) * step
    return Tiles(size, back, ahead, window, is_causal, count, step, max(1, most // scores))


def _slots(cluster: Tensor, clusters: int, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """`order`, `cluster` and `slot` of a layout."""
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
    first_row = head // heads * (seq_len * heads) + head % heads  # rows lie as (B, T, H)
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
    """The slots in which a window is what a token may read: its cluster's `window` last members.

    `cluster` (B, H, T) is the cluster of each token. Attention is cut for a type of device; None: that of
    `cluster`.
    """
    kind = device_type or cluster.device.type
    tiles = _tiles(cluster, clusters, window, is_causal=is_causal, device_type=kind)
    if torch.compiler.is_compiling():
        order, kinds, slot = _slots_operator(cluster, clusters, list(tiles))
    else:  # operation by operation, so that counters see what is computed and held
        order, kinds, slot = _slots(cluster, clusters, tiles)
    return Layout(order, kinds, slot, tiles)


def _slices(tiles: Tiles, heads: int) -> list[tuple[slice, slice]]:
    """(heads, tiles) to work on at a time."""
    return [
        (slice(head, min(head + tiles.heads, heads)), slice(tile, tile + tiles.step))
        for head in range(0, heads, tiles.heads)
        for tile in range(0, tiles.number, tiles.step)
    ]


class _Slice:
    """Some tiles of some heads, g of these: their slots, and the weights of their queries over their keys."""

    def __init__(self, layout: Layout, heads: slice, tiles: slice) -> None:
        self.tiles = layout.tiles
        size, back, ahead = self.tiles[:3]
        self.places = slice(tiles.start * size, tiles.stop * size + back + ahead)
        """Slots of keys, (g, L) of them."""
        self.inner = slice(back, self.places.stop - self.places.start - ahead)
        """Among these, slots of queries."""
        self.order = layout.order[heads, self.places]
        self.cluster = layout.cluster[heads, self.places]

    def rows(self, x: Tensor) -> Tensor:
        """The slots' rows of x (N, D), (g, L, D'), in float32 or wider."""
        found = x.index_select(0, self.order.flatten()).unflatten(0, self.order.shape)
        found = found.to(torch.promote_types(x.dtype, torch.float32))
        more = _width(x) - x.shape[-1]
        return F.pad(found, (0, more)) if more else found

    def queries(self, slots: Tensor) -> Tensor:
        """(g, L, …) → the queries of each tile (g, n, b, …), a view."""
        tiles: Tensor = slots[:, self.inner].unflatten(1, (-1, self.tiles.size))
        return tiles

    def keys(self, slots: Tensor) -> Tensor:
        """(g, L, …) → the keys of each tile (g, n, k, …), a view."""
        return slots.unfold(1, self.tiles.keys, self.tiles.size).movedim(-1, 2)

    def add_keys(self, slots: Tensor, keys: Tensor) -> None:
        """The transpose of `keys`: adds to each slot what it got in every tile that was given it."""
        parts = keys.unflatten(2, (-1, self.tiles.size)).unbind(2)  # (g, n, b, D) each
        by_tile = slots.unflatten(1, (-1, self.tiles.size))
        for i, part in enumerate(parts):
            by_tile[:, i : i + part.shape[1]] += part

    def forbidden(self) -> Tensor:
        """(g, n, b, k) bool: which pairs the rule forbids. Queries in empty slots read empty slots."""
        size, back, _, window, is_causal, *_ = self.tiles
        slot = torch.arange(self.tiles.keys, device=self.cluster.device)
        distance = slot[back : back + size, None] - slot
        far = distance.abs() >= window
        if is_causal:
            far |= distance < 0
        of_query, of_key = self.queries(self.cluster), self.keys(self.cluster)
        if back:  # a tile is of one cluster, its first row's, and what is empty in it reads what that reads
            of_query = of_query[..., :1]
        return (of_query[..., None] != of_key[:, :, None]) | far

    def attended(self, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of rows (N, D): weights (g, n, b, k), exactly 0 where forbidden; queries (g, n, b, D'), divided by
        √D; keys and values (g, n, k, D').

        A value that is not finite would reach whoever gives it the weight 0. So it is taken as 0, and its
        key as NaN, which reaches those alone that may read it.
        """
        rows, values = self.rows(qk), self.rows(v)
        rows[..., 0] += (values * 0).sum(dim=-1)
        values = values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        q, k = self.queries(rows) * qk.shape[-1] ** -0.5, self.keys(rows)
        weights = (q @ k.mT).masked_fill_(self.forbidden(), -math.inf).softmax(dim=-1)
        return weights, q, k, self.keys(values)


@repeatable
class Windowed(torch.autograd.Function):
    """Softmax attention of every row to the rows of its cluster in its window.

    (B, T, H, D) shared queries and keys, and values → (B, T, H, D). Stores its inputs and nothing else;
    backward gathers and scores again, slice by slice. Products are float32 or wider.
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Slice by slice into one buffer by slots, then back into the order of rows."""
        ctx.save_for_backward(qk, v, *layout[:3])
        ctx.tiles = layout.tiles
        flat = qk.reshape(-1, qk.shape[-1]), v.reshape(-1, v.shape[-1])
        y = v.new_empty(*layout.order.shape, _width(v))
        with torch.autocast(v.device.type, enabled=False):
            for heads, tiles in _slices(layout.tiles, y.shape[0]):
                here = _Slice(layout, heads, tiles)
                weights, _, _, values = here.attended(*flat)
                here.queries(y[heads, here.places]).copy_(weights @ values)
        return _by_row(y, layout, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of each slice added up by slots; what empty slots get stays there."""
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
    """D', the channels of a row x (…, D) in a slot."""
    return -(-x.shape[-1] // ALIGNED) * ALIGNED


def _by_row(slots: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """(B·H, S, D') → (B, T, H, D), of the dtype of what it is like."""
    rows = slots.flatten(0, 1)[:, : like.shape[-1]].index_select(0, layout.slot)
    return rows.view(like.shape).to(like.dtype)


def _add_gradients(here: _Slice, qk: Tensor, v: Tensor, dy: Tensor, dqk: Tensor, dv: Tensor) -> None:
    """Adds what the queries of a slice contribute to dqk and dv of its heads, (g, S, D) each.

    A function, so that what a slice leaves behind is freed before the next one.
    """
    weights, q, k, values = here.attended(qk, v)
    dqk, dv = dqk[:, here.places], dv[:, here.places]
    given = here.queries(here.rows(dy) * (here.cluster >= 0)[..., None])
    here.add_keys(dv, weights.mT @ given)
    d_scores = torch.ops.aten._softmax_backward_data(given @ values.mT, weights, -1, weights.dtype)
    here.queries(dqk).add_(d_scores @ k, alpha=qk.shape[-1] ** -0.5)
    here.add_keys(dqk, d_scores.mT @ q)
