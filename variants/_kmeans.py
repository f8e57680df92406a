"""Spherical k-means over tokens, and attention within its clusters, for `variants.routing`.

Shapes: B batch, T tokens, H heads, D channels a head, K clusters a head, N = B · T · H rows, w members
of a cluster, m window.

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

from variants._pieces import Sizes
from variants._repeats import repeatable
from variants.layers import ROTARY_BASE, rotary

PIECE = Sizes(cpu=2**21, accelerator=2**24)
"""Scores held at a time: 8 MiB, so that a piece is made, used and overwritten in cache."""
MOST_PIECES = 16
"""Beyond them pieces grow instead, by 1/16 of what would be held at once."""
SLICE = Sizes(cpu=2**18, accelerator=2**23)
"""Scores within clusters held at a time: 1 MiB, because what they are made of and made into is larger."""
BLOCKS = 2
"""Blocks a window is cut into: more of them compute fewer forbidden pairs, in smaller products."""
EPSILON = 1e-5
"""Of the layer normalisation, as torch has it."""


def unit(x: Tensor) -> Tensor:
    """Layer normalisation without scale or bias: on the sphere of radius √D. float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), x.shape[-1:], eps=EPSILON)


@torch.no_grad()
@repeatable
def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The cluster of each token, and each cluster's sum of members.

    (B, T, H, D) and (H, K, D) → (B, H, T) int64, (H, K, D). The cluster is the one whose centroid has
    the largest dot product with the normalised token; of equals, the one with the lowest index.
    """
    batch, seq_len, heads, head_dim = x.shape
    clusters = centroids.shape[1]
    sums = torch.zeros(heads, clusters, head_dim, device=x.device)
    head = torch.arange(heads, device=x.device)[:, None]
    length = max(1, PIECE.on(x.device) // (batch * heads * clusters), -(-seq_len // MOST_PIECES))
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
def members(x: Tensor, centroids: Tensor, count: int) -> tuple[Tensor, Tensor]:
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
        wanted = PIECE.on(x.device) // (batch * heads * seq_len)
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


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (T, 1, D/2) of rotary positions, as `layers.rotary` has them, for x (B, T, H, D)."""
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    rates = torch.exp(torch.arange(half, device=x.device, dtype=wide) * (-math.log(ROTARY_BASE) / half))
    angle = torch.arange(x.shape[1], device=x.device, dtype=wide)[:, None, None] * rates
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs of channels (i, i + D/2) in few passes and one buffer, for use without autograd."""
    y = x * torch.cat([cos, cos], dim=-1)
    (a, b), (c, d) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    c.addcmul_(b, sin, value=-1)
    d.addcmul_(a, sin)
    return y


class Blocks(NamedTuple):
    """A block of `size` queries is given the rows from `back` before its first to `ahead` after its last."""

    size: int
    back: int
    ahead: int
    window: int
    is_causal: bool

    @property
    def keys(self) -> int:
        """Rows that a block is given."""
        return self.back + self.size + self.ahead


class Layout(NamedTuple):
    """Every row of every head in one order, by (sequence, head, cluster, position), cut into blocks.

    Heads are merely further clusters, so that blocks need not end where heads do.
    """

    order: Tensor
    """(back + n·size + ahead,) int64: the row that stands at each place; 0 in the padding."""
    place: Tensor
    """(N,) int64: where each row stands, the padding in front not counted."""
    first: Tensor
    """(n·size,) int64: the place of the first row of the cluster at each place."""
    last: Tensor
    """(n·size,) int64: and of the last."""
    blocks: Blocks


@torch.no_grad()
@repeatable
def lay_out(cluster: Tensor, clusters: int, window: int, *, is_causal: bool) -> Layout:
    """The order in which a window is what a token may read: its clusters' `window` last members."""
    batch, heads, seq_len = cluster.shape
    total = cluster.numel()
    device = cluster.device
    window = min(window, seq_len)
    if window == seq_len:  # a block is a whole head
        block, back = seq_len, 0
    else:
        block = -(-window // BLOCKS)
        back = -(-(window - 1) // block) * block
    ahead = 0 if is_causal else back
    padded = -(-total // block) * block

    by_cluster, order = cluster.sort(dim=-1, stable=True)  # (B, H, T)
    sequence = torch.arange(batch, device=device)[:, None, None] * seq_len
    head = torch.arange(heads, device=device)[:, None]
    row = ((order + sequence) * heads + head).flatten()  # rows lie as (B, T, H)
    place = torch.empty_like(row).scatter_(0, row, torch.arange(total, device=device))

    size = torch.zeros(batch, heads, clusters, dtype=torch.int64, device=device)
    size.scatter_add_(-1, cluster, torch.ones_like(cluster))
    end = size.flatten().cumsum(0).view_as(size)
    first, last = (end - size).gather(-1, by_cluster).flatten(), (end - 1).gather(-1, by_cluster).flatten()
    alone = torch.arange(total, padded, device=device)  # padding reads itself alone, and is read by nothing
    return Layout(
        order=F.pad(row, (back, padded - total + ahead)),
        place=place,
        first=torch.cat([first, alone]),
        last=torch.cat([last, alone]),
        blocks=Blocks(block, back, ahead, window, is_causal),
    )


def _mask(layout: Layout, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """(n, size, keys): 0 where the query at a place in [begin, end) may read, else −∞."""
    size, back, _, window, is_causal = layout.blocks
    device = layout.first.device
    slot = torch.arange(layout.blocks.keys, dtype=torch.int32, device=device)
    distance = torch.arange(back, back + size, dtype=torch.int32, device=device)[:, None] - slot
    near = (distance < window) & (distance >= (0 if is_causal else 1 - window))
    forbidden = torch.full((), -math.inf, dtype=dtype, device=device)
    band = torch.where(near, torch.zeros_like(forbidden), forbidden)  # (size, keys), the same in all blocks
    origin = torch.arange(begin - back, end - back, size, device=device)[:, None]  # the place of slot 0
    allowed = slot >= (layout.first[begin:end].view(-1, size) - origin).int()[..., None]
    if not is_causal:
        allowed &= slot <= (layout.last[begin:end].view(-1, size) - origin).int()[..., None]
    return torch.where(allowed, band, forbidden)


def _slices(layout: Layout) -> list[tuple[int, int]]:
    """Places of the queries to work on at a time, whole blocks."""
    places, blocks = layout.first.shape[0], layout.blocks
    step = max(SLICE.on(layout.first.device) // blocks.keys, -(-places // MOST_PIECES))
    step = max(1, step // blocks.size) * blocks.size
    return [(begin, min(begin + step, places)) for begin in range(0, places, step)]


def _gather(x: Tensor, row: Tensor) -> Tensor:
    """Rows of x (B, T, H, D), which need not be contiguous."""
    heads = x.shape[2]
    return x.flatten(0, 1)[row // heads, row % heads]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(n, size, D), (n, keys, D), (n, keys, D), (n, size, keys) → (n, size, D)."""
    y: Tensor = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask[None])
    return y[0]


def _queries(rows: Tensor, blocks: Blocks) -> Tensor:
    """(back + s + ahead, D) → the queries of each block (s/size, size, D), a view."""
    return rows[blocks.back : rows.shape[0] - blocks.ahead].view(-1, blocks.size, rows.shape[-1])


def _windows(rows: Tensor, blocks: Blocks) -> Tensor:
    """(back + s + ahead, D) → the keys of each block (s/size, keys, D), a view."""
    return rows.unfold(0, blocks.keys, blocks.size).transpose(1, 2)


def _add_windows(rows: Tensor, windows: Tensor, blocks: Blocks) -> None:
    """The transpose of `_windows`: adds to each row what it got in every block that was given it."""
    parts = windows.unflatten(1, (-1, blocks.size))  # (n, keys/size, size, D)
    by_block = rows.unflatten(0, (-1, blocks.size))
    for part in range(parts.shape[1]):
        by_block[part : part + parts.shape[0]] += parts[:, part]


def _add_gradients(
    layout: Layout, begin: int, end: int, qk: Tensor, v: Tensor, dy: Tensor, dqk: Tensor, dv: Tensor
) -> None:
    """Adds what the queries at the places [begin, end) contribute to dqk and dv, in sorted order.

    A function, so that what a slice leaves behind is freed before the next one.
    """
    blocks = layout.blocks
    stop = end + blocks.back + blocks.ahead
    given = layout.order[begin:stop]
    rows, values = _gather(qk, given), _gather(v, given)
    dy_rows = _gather(dy, layout.order[begin + blocks.back : end + blocks.back])
    views = _queries(rows, blocks), _windows(rows, blocks), _windows(values, blocks)
    with torch.enable_grad():
        q, k, w = (view.detach().requires_grad_() for view in views)
        y = _attend(q, k, w, _mask(layout, begin, end, v.dtype))
    dq, dk, dw = torch.autograd.grad(y, (q, k, w), dy_rows.view_as(y))
    _queries(dqk[begin:stop], blocks).add_(dq)
    _add_windows(dqk[begin:stop], dk, blocks)
    _add_windows(dv[begin:stop], dw, blocks)


def windowed_plainly(x: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """What `Windowed` computes, in one piece and with autograd's own backward pass."""
    rows = _gather(rotary(unit(x)).to(v.dtype), layout.order)
    mask = _mask(layout, 0, layout.first.shape[0], v.dtype)
    blocks = layout.blocks
    values = _windows(_gather(v, layout.order), blocks)
    y = _attend(_queries(rows, blocks), _windows(rows, blocks), values, mask)
    return y.flatten(0, 1)[layout.place].view(v.shape)


@repeatable
class Windowed(torch.autograd.Function):
    """Softmax attention of every row to the rows of its cluster in its window.

    (B, T, H, D) shared queries and keys before normalisation, and values → (B, T, H, D). Stores its
    inputs and nothing else; backward normalises, gathers and scores again, slice by slice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Slice by slice into one buffer in sorted order, then back into the order of rows."""
        blocks = layout.blocks
        ctx.save_for_backward(x, v, *layout[:4])
        ctx.blocks = blocks
        qk = turn(unit(x), *angles(x)).to(v.dtype)
        y = v.new_empty(layout.first.shape[0], v.shape[-1])
        for begin, end in _slices(layout):
            given = layout.order[begin : end + blocks.back + blocks.ahead]
            rows, values = _gather(qk, given), _windows(_gather(v, given), blocks)
            mask = _mask(layout, begin, end, v.dtype)
            y[begin:end] = _attend(_queries(rows, blocks), _windows(rows, blocks), values, mask).flatten(0, 1)
        return y.index_select(0, layout.place).view(v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of each slice added up in sorted order, then back through the normalisation.

        What the padding gets stays in the padding, which `place` does not name.
        """
        x, v, order, place, first, last = ctx.saved_tensors
        blocks = ctx.blocks
        layout = Layout(order, place, first, last, blocks)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        content, *moments = torch.ops.aten.native_layer_norm(wide, x.shape[-1:], None, None, EPSILON)
        cos, sin = angles(x)
        qk = turn(content, cos, sin).to(v.dtype)
        del content
        dqk, dv = (v.new_zeros(layout.order.shape[0], v.shape[-1]) for _ in range(2))
        for begin, end in _slices(layout):
            _add_gradients(layout, begin, end, qk, v, dy, dqk, dv)
        del qk
        back = blocks.back
        drows = dqk[back:].index_select(0, layout.place).view(x.shape).to(wide.dtype)
        del dqk
        dcontent = turn(drows, cos, -sin)  # a rotation's transpose is its inverse
        dx = torch.ops.aten.native_layer_norm_backward(
            dcontent, wide, x.shape[-1:], *moments, None, None, [True, False, False]
        )[0]
        return dx.to(x.dtype), dv[back:].index_select(0, layout.place).view(v.shape), None
