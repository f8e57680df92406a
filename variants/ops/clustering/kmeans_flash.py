"""Attention within the clusters of tokens by flash attention, for `variants.attention.routing`.

*Untried* on a device: see `fused.flash`.

Shapes: B batch, T tokens, H heads, D channels of a head, K clusters of a head, N = B · T · H rows; C chunks
of all heads, and R places of their keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.fused.flash import DevicePacking, flash_backward, flash_forward
from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.patterns.pair_counts import window_pairs

WINDOWS = 2
"""Windows of a chunk. Longer chunks copy fewer keys; the kernel starts more threads for short clusters."""
SMALLEST = 128
"""Minimum number of tokens of a chunk: a tile of the kernel."""


class Bounds(NamedTuple):
    """Bounds that follow from shapes."""

    chunk: int
    """Tokens of a chunk; the last one of a cluster may be shorter."""
    carried: int
    """Keys that a chunk copies from the one before it in its cluster."""
    chunks: int
    """Chunks of a head, some of them empty."""
    keys: int
    """R: places of keys of all heads. One more place receives what has no place."""


class Layout(NamedTuple):
    """Rows sorted by (sequence, head, cluster, position), in chunks of the same cluster.

    A chunk is a sequence for the kernel. Its keys are the last members of the cluster before it, which are
    copied, and its own rows. The rank of a row in its cluster decides its chunk and its place in there. So
    later tokens do not change the order of any sum, nor its rounding.
    """

    rows: Tensor
    """(N,) int64: the row in each place."""
    place: Tensor
    """(N,) int64: the place of each row."""
    keys: Tensor
    """(R + 1,) int64: the row in each place of a key; 0 in places that no chunk reads."""
    key_places: Tensor
    """(2, N) int64: the places of each row among the keys: its own, and its copy or R."""
    q_offsets: Tensor
    """(C + 1,) int32"""
    k_offsets: Tensor
    """(C + 1,) int32"""


def bounds_of(batch_heads: int, seq_len: int, clusters: int, window: int) -> Bounds:
    """The bounds for clusters of any sizes."""
    window = min(window, seq_len)
    chunk = min(seq_len, max(SMALLEST, WINDOWS * window))
    chunks = (seq_len + min(clusters, seq_len) * (chunk - 1)) // chunk
    # a chunk that copies keys follows a full one
    keys = batch_heads * (seq_len + (seq_len - 1) // chunk * (window - 1))
    return Bounds(chunk, window - 1, chunks, keys)


def _lay_out(cluster: Tensor, clusters: int, bounds: Bounds) -> tuple[Tensor, ...]:
    """The fields of a Layout; `cluster` (B, H, T)."""
    batch, heads, seq_len = cluster.shape
    chunk, carried, chunks, keys = bounds
    count = torch.zeros(batch, heads, clusters, dtype=torch.int64, device=cluster.device)
    count.scatter_add_(-1, cluster, torch.ones_like(cluster))
    begin = count.cumsum(-1) - count  # the first place of each cluster in its head
    needed = (count + chunk - 1) // chunk
    after = needed.cumsum(-1)
    first = after - needed  # the first chunk of each cluster

    # each chunk: where it begins, and how many keys it copies; an empty one begins at the end of its head
    number = torch.arange(chunks, device=cluster.device).expand(batch, heads, -1).contiguous()
    its_cluster = torch.searchsorted(after, number, right=True)
    index = number - F.pad(first, (0, 1)).gather(-1, its_cluster)
    start = F.pad(begin, (0, 1), value=seq_len).gather(-1, its_cluster) + index * chunk
    start = start.clamp(max=seq_len)
    copies = ((index > 0) & (its_cluster < clusters)) * carried
    head = torch.arange(batch * heads, device=cluster.device).view(batch, heads, 1)
    length = F.pad(start[..., 1:], (0, 1), value=seq_len) - start
    q_offsets = F.pad((start + head * seq_len).flatten(), (0, 1), value=cluster.numel())
    k_offsets = F.pad((length + copies).flatten().cumsum(0), (1, 0))

    # each place: its row, and its places among the keys
    by_cluster, order = cluster.sort(dim=-1, stable=True)
    rank = torch.arange(seq_len, device=cluster.device) - begin.gather(-1, by_cluster)
    index, offset = rank // chunk, rank % chunk
    here = first.gather(-1, by_cluster) + index + head * chunks
    own = k_offsets[here] + copies.flatten()[here] + offset
    is_copied = (index + 1 < needed.gather(-1, by_cluster)) & (offset >= chunk - carried)
    copy = torch.where(is_copied, k_offsets[here + 1] + offset - (chunk - carried), keys)
    rows = ((head // heads * seq_len + order) * heads + head % heads).flatten()
    key_rows = torch.zeros(keys + 1, dtype=torch.int64, device=cluster.device)
    key_rows.scatter_(0, own.flatten(), rows).scatter_(0, copy.flatten(), rows)
    place = torch.empty_like(rows).scatter_(0, rows, torch.arange(len(rows), device=cluster.device))
    key_places = torch.stack([own.flatten(), copy.flatten()]).index_select(1, place)
    return rows, place, key_rows, key_places, q_offsets.int(), k_offsets.int()


_layout_operator = operator(
    "cluster_chunks",
    lambda cluster, clusters, bounds: _lay_out(cluster, clusters, Bounds._make(bounds)),
    schema="(Tensor cluster, SymInt clusters, SymInt[] bounds) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_layout_operator.register_fake
def _layout_shapes(cluster: Tensor, clusters: int, bounds: list[int]) -> tuple[Tensor, ...]:
    made, (batch, heads, _) = Bounds._make(bounds), cluster.shape
    rows = cluster.new_empty(cluster.numel())
    offsets = cluster.new_empty(batch * heads * made.chunks + 1, dtype=torch.int32)
    keys, key_places = cluster.new_empty(made.keys + 1), cluster.new_empty(2, len(rows))
    return rows, torch.empty_like(rows), keys, key_places, offsets, torch.empty_like(offsets)


@torch.no_grad()
@repeatable
def lay_out(cluster: Tensor, clusters: int, window: int) -> Layout:
    """Lay out the rows so that each reads the last `window` members of its cluster; cluster (B, H, T)."""
    batch, heads, seq_len = cluster.shape
    bounds = bounds_of(batch * heads, seq_len, clusters, window)
    if torch.compiler.is_compiling():  # as in `kmeans_attention`: the compiler may read before a scatter
        return Layout(*_layout_operator(cluster, clusters, list(bounds)))
    return Layout(*_lay_out(cluster, clusters, bounds))


def cluster_attention(qk: Tensor, v: Tensor, cluster: Tensor, clusters: int, window: int) -> Tensor:
    """Causal softmax attention of each row to the last `window` members of its cluster, itself included.

    Shared queries and keys, and values (B, T, H, D); the cluster of each token (B, H, T) → (B, T, H, D).
    """
    batch, seq_len, heads, _ = v.shape
    layout = lay_out(cluster, clusters, window)
    bounds = bounds_of(batch * heads, seq_len, clusters, window)
    packing = DevicePacking(
        queries=layout.q_offsets,
        keys=layout.k_offsets,
        most_queries=bounds.chunk,
        most_keys=bounds.chunk + bounds.carried,
        pairs=batch * heads * window_pairs(seq_len, window, is_causal=True),
    )
    y: Tensor = _Chunked.apply(qk, v, layout, packing, bounds.carried)  # type: ignore[no-untyped-call]
    return y


class _Chunked(torch.autograd.Function):
    """`cluster_attention` by a layout. Saves inputs, outputs and logsumexp; backward gathers rows again."""

    @staticmethod
    def forward(ctx: Any, qk: Tensor, v: Tensor, layout: Layout, packing: DevicePacking, left: int) -> Tensor:
        """Gather rows, attend, and gather the outputs in the order of rows."""
        q, k, values = _gathered(qk, v, layout)
        y, lse = flash_forward(q, k, values, causal=True, window=(left, None), packing=packing)
        ctx.save_for_backward(qk, v, y, lse, *layout)
        ctx.packing, ctx.left = packing, left
        return y.flatten(1).index_select(0, layout.place).view_as(v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a row is the sum of those of its query, its key and the copy of its key."""
        qk, v, y, lse, *fields = ctx.saved_tensors
        layout = Layout(*fields)
        q, k, values = _gathered(qk, v, layout)
        dy = dy.reshape(-1, dy.shape[-1]).index_select(0, layout.rows).unsqueeze(1)
        dq, dk, dv = flash_backward(
            dy, q, k, values, y, lse, causal=True, window=(ctx.left, None), packing=ctx.packing
        )
        dqk = dq.flatten(1).index_select(0, layout.place) + _summed(dk, layout)
        return dqk.view_as(qk), _summed(dv, layout).view_as(v), None, None, None


def _gathered(qk: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (N, 1, D), keys and values (R + 1, 1, D) in their places."""
    flat_qk, flat_v = (t.reshape(-1, t.shape[-1]) for t in (qk, v))
    q, k, values = (
        flat.index_select(0, rows).unsqueeze(1)
        for flat, rows in ((flat_qk, layout.rows), (flat_qk, layout.keys), (flat_v, layout.keys))
    )
    return q, k, values


def _summed(d_keys: Tensor, layout: Layout) -> Tensor:
    """Gradients (R + 1, 1, D) of the places of keys, added up for each row (N, D)."""
    d_keys[-1] = 0  # of the rows without a copy
    both = d_keys.flatten(1).index_select(0, layout.key_places.flatten())
    added: Tensor = both.unflatten(0, (2, -1)).sum(0)
    return added
