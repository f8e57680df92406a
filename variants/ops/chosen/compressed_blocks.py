"""Attention to compressed keys, whose weights select blocks (Yuan 2025, arXiv:2502.11089, §3.3).

Shapes: N sequences of one head of keys, T tokens, G query heads that share the keys and the selection, D
channels of a head, l tokens of a compressed key, d tokens between two of them, m compressed keys, b tokens of
a block, P queries of a piece, S selected blocks of a query.

The weights are computed in pieces of queries, and again in the backward pass. A piece computes scores of the
compressed keys that its last query may read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

SCORES = Sizes(cpu=2**19, accelerator=2**28)
"""Scores computed at a time."""
FEWEST_PIECES, MOST_PIECES = 4, 64
"""Pieces of a sequence: several, because a piece computes some forbidden scores; not too many operations."""
FORCED = 3
"""Blocks that a query reads in any case: the first, the one before its own, and its own."""


class Compression(NamedTuple):
    """Sizes of compressed keys and of the selection."""

    length: int
    """l."""
    stride: int
    """d, a divisor of l and of b."""
    block: int
    """b, at least l."""
    selected: int
    """Blocks that are selected beside the forced ones, for the last query."""
    device_type: str

    def readable(self, end: int) -> int:
        """Compressed keys that consist of the first `end` tokens."""
        return max(0, (end - self.length) // self.stride + 1)

    def pairs(self, seq_len: int) -> int:
        """Pairs of a query and a compressed key that it reads."""
        full, rest = divmod(max(0, seq_len - self.length + 1), self.stride)
        return self.stride * full * (full + 1) // 2 + rest * (full + 1)


def selectable(own: int) -> int:
    """Blocks among which a query of the block `own` selects: 1 … own − 2."""
    return max(0, own - FORCED + 1)


def block_scores(weights: Tensor, blocks: int, sizes: Compression) -> Tensor:
    """The weights of compressed keys (…, m), summed over those that overlap a block, in strides: (…, blocks).

    Equation 9: a stride of d tokens has the weights of all compressed keys that contain it. There must be
    a compressed key for the beginning of each stride.
    """
    parts, strides = sizes.length // sizes.stride, sizes.block // sizes.stride
    inside = weights[..., : blocks * strides].unflatten(-1, (blocks, strides))
    # a key of a block counts `parts` times, but some of its strides may be those of the next block
    scores: Tensor = inside.sum(-1).mul_(parts)
    for i in range(parts - 1):
        crossing = inside[..., strides - 1 - i] * (parts - 1 - i)
        scores -= crossing
        scores[..., 1:] += crossing[..., :-1]
    return scores


def choose(weights: Tensor, query: Tensor, last: int, nothing: int, sizes: Compression) -> Tensor:
    """The blocks that queries select, best first: (N, P, S), from their weights (N, P, m).

    `query` (P,) are the tokens of the queries, of which the last is `last`. A query with fewer blocks has the
    number `nothing` in place of the others. The forced blocks are never among them.
    """
    sequences, tokens, _ = weights.shape
    picks = torch.full((sequences, tokens, sizes.selected), nothing, dtype=torch.int64, device=weights.device)
    candidates = selectable(last // sizes.block)
    found = min(sizes.selected, candidates)
    if found:
        scores = block_scores(weights, candidates + 1, sizes)[..., 1:]
        own = query[:, None] // sizes.block
        later = torch.arange(candidates, device=query.device) + 1 > own - FORCED + 1
        best = scores.masked_fill(later, -math.inf).topk(found).indices + 1
        missing = torch.arange(found, device=query.device) > own - FORCED
        picks[..., :found] = best.masked_fill(missing, nothing)
    return picks


def _pieces(tokens: int, keys: int, first: int, sizes: Compression) -> Iterator[slice]:
    """Pieces of the queries from `first` on; `keys` is the number of scores of a query, of all heads."""
    queries = tokens - first
    step = min(SCORES.on(sizes.device_type) // max(1, keys), -(-queries // FEWEST_PIECES))
    step = max(1, step, -(-queries // MOST_PIECES))
    for begin in range(first, tokens, step):
        yield slice(begin, min(begin + step, tokens))


def _weights(rows: Tensor, k: Tensor, first: int, queries: int, sizes: Compression) -> Tensor:
    """softmax of the scores of rows (N, P · G, D) over the complete compressed keys (N, m, D), in float32 or
    wider. Each of the P queries, from the token `first` on, must have one."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    scores = (rows @ k.mT).to(wide).mul_(rows.shape[-1] ** -0.5)
    # all queries read the first keys
    query = torch.arange(first, first + queries, device=k.device)
    common = sizes.readable(first + 1)
    end = torch.arange(common, k.shape[1], device=k.device) * sizes.stride + sizes.length - 1
    by_query = scores[..., common:].unflatten(1, (queries, -1))
    by_query.masked_fill_((end > query[:, None])[:, None], -math.inf)
    return scores.softmax(-1)


@repeatable
def _attend(
    tensors: list[Tensor], outputs: list[Tensor], first: int, nothing: int, sizes: Compression
) -> None:
    """Write the outputs (N, P, G, D) and the picks (N, P, S) of the queries from `first` on."""
    (q, k, v), (y, picks) = tensors, outputs
    queries = q.shape[1]
    weights = _weights(q.flatten(1, 2), k, first, queries, sizes)
    y.copy_((weights.to(v.dtype) @ v).view(y.shape))
    if sizes.selected:
        query = torch.arange(first, first + queries, device=q.device)
        groups = weights.unflatten(1, (queries, -1))
        summed = groups.sum(2) if groups.shape[2] > 1 else groups[:, :, 0]
        picks.copy_(choose(summed, query, first + queries - 1, nothing, sizes))


@repeatable
def _attend_backward(tensors: list[Tensor], gradients: list[Tensor], first: int, sizes: Compression) -> None:
    """Write the gradients of the queries of a piece, and add those of keys and values."""
    (dy, q, k, v), (dq, dk, dv) = tensors, gradients
    rows, d_rows, scale = q.flatten(1, 2), dy.flatten(1, 2), q.shape[-1] ** -0.5
    weights = _weights(rows, k, first, q.shape[1], sizes)
    d_weights = (d_rows @ v.mT).to(weights.dtype)
    dv += (weights.to(d_rows.dtype).mT @ d_rows).to(dv.dtype)
    d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_scores = d_scores.mul_(scale).to(rows.dtype)
    dq.copy_((d_scores @ k).view(dq.shape))
    dk += (d_scores.mT @ rows).to(dk.dtype)


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sizes: Compression) -> tuple[Tensor, Tensor]:
        sequences, tokens, heads, _ = q.shape
        nothing = tokens // sizes.block
        y = torch.zeros_like(q)
        picks = torch.full((sequences, tokens, sizes.selected), nothing, dtype=torch.int64, device=q.device)
        for piece in _pieces(tokens, sequences * heads * k.shape[1], sizes.length - 1, sizes):
            visible = sizes.readable(piece.stop)
            tensors = [q[:, piece], k[:, :visible], v[:, :visible]]
            _attend(tensors, [y[:, piece], picks[:, piece]], piece.start, nothing, sizes)
        ctx.save_for_backward(q, k, v)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(picks)
        return y, picks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        (q, k, v), sizes = ctx.saved_tensors, ctx.sizes
        sequences, tokens, heads, _ = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        for piece in _pieces(tokens, sequences * heads * k.shape[1], sizes.length - 1, sizes):
            visible = sizes.readable(piece.stop)
            tensors = [dy[:, piece], q[:, piece], k[:, :visible], v[:, :visible]]
            _attend_backward(tensors, [dq[:, piece], dk[:, :visible], dv[:, :visible]], piece.start, sizes)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def compressed_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Compression) -> tuple[Tensor, Tensor]:
    """Attention to the complete compressed keys, and the blocks that its weights select.

    Queries (B, H, T, D), compressed keys and values (B, heads of keys, m, D) → (B, H, T, D), and blocks
    (B, heads of keys, T, S), which have no gradient. The weights of the query heads that share keys are
    added for the selection (equation 10). A query without a complete compressed key gives 0.
    """
    batch, key_heads = k.shape[:2]
    rows = q.unflatten(1, (key_heads, -1)).permute(0, 1, 3, 2, 4).flatten(0, 1).contiguous()  # (N, T, G, D)
    y, picks = _Compressed.apply(rows, k.flatten(0, 1), v.flatten(0, 1), sizes)  # type: ignore[no-untyped-call]
    y = y.unflatten(0, (batch, key_heads)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return y, picks.unflatten(0, (batch, key_heads))
