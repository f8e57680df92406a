"""Attention to the nearest keys of a memory of earlier segments (Wu 2022, arXiv:2203.08913, §3.1).

Shapes: B batch, H heads, K heads of keys, T tokens, D channels of a head, s tokens of a segment, n segments
of a piece, M keys of the memory of a segment, k nearest keys.

A segment reads the k best of the M keys before it, of each query. All scores are computed, in pieces of
segments, and none is kept: the forward pass saves its inputs, the places of the k keys and their scores. The
memory is detached, so the backward pass computes gradients of the k keys' scores alone, and only those of
queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

SCORES = Sizes(cpu=2**21, accelerator=2**29)
"""Scores computed at a time."""
MOST_PIECES = 64
"""Maximum number of pieces; beyond it the pieces grow, which bounds the number of operations."""


class Memory(NamedTuple):
    """Sizes of the search."""

    segment: int
    """s."""
    length: int
    """M, at most, before each segment."""
    nearest: int
    """k, at most."""
    device_type: str

    def reach(self, seq_len: int) -> int:
        """Keys in the memory of the last segment."""
        return min(self.length, (seq_len - 1) // self.segment * self.segment)

    def most_read(self, seq_len: int) -> int:
        """Keys that a query of the last segment reads."""
        return min(self.nearest, self.reach(seq_len))

    def pairs(self, seq_len: int) -> tuple[int, int]:
        """Pairs of a query and a key of its memory, and of a query and a key that it reads."""
        searched = read = 0
        for start in range(self.segment, seq_len, self.segment):
            queries, keys = min(self.segment, seq_len - start), min(self.length, start)
            searched += queries * keys
            read += queries * min(self.nearest, keys)
        return searched, read


class _Piece(NamedTuple):
    """Segments of some sequences: heads [heads) of B·H, segments from the token `start` on."""

    heads: slice
    start: int
    segments: int
    tokens: int
    """Tokens of each segment."""

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.segments * self.tokens

    def of(self, x: Tensor) -> Tensor:
        """(B·H, T, …) → views (heads, n, s, …)."""
        segments: Tensor = x[self.heads, self.start : self.stop].unflatten(1, (self.segments, self.tokens))
        return segments


def _pieces(sequences: int, seq_len: int, sizes: Memory) -> Iterator[_Piece]:
    """All segments but the first; the last may be shorter."""
    segment, reach = sizes.segment, sizes.reach(seq_len)
    full, rest = divmod(seq_len - segment, segment)
    scores = segment * reach
    at_once = max(1, SCORES.on(sizes.device_type) // scores, -(-sequences * full // MOST_PIECES))
    step = max(1, min(full, at_once))
    heads = max(1, at_once // max(1, full))
    for first in range(0, sequences, heads):
        some = slice(first, min(first + heads, sequences))
        for begin in range(0, full, step):
            count = min(step, full - begin)
            yield _Piece(some, segment * (1 + begin), count, segment)
        if rest:
            yield _Piece(some, segment * (1 + full), 1, rest)


@repeatable
def _search(q: Tensor, keys: Tensor, missing: int, count: int) -> tuple[Tensor, Tensor]:
    """Scores and places in their windows of the best keys of queries (heads, n, s, D), from windows of keys
    (heads, n, M, D): (heads, n, s, k). Of segment i, the first missing − i·s keys do not exist."""
    heads, segments, tokens, _ = q.shape
    scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT)
    scores = scores.unflatten(0, (heads, segments))
    if missing > 0:
        first = missing - tokens * torch.arange(segments, device=q.device)[:, None, None]
        scores.masked_fill_(torch.arange(keys.shape[2], device=q.device) < first, -math.inf)
    best = scores.topk(count, dim=-1)
    return best.values, best.indices


@repeatable
def _read(values: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Σ of the rows of values (rows, D) at the places (queries, k), with weights (queries, k)."""
    rows = values.index_select(0, places.flatten()).view(*places.shape, -1)
    return torch.bmm(weights[:, None].to(rows.dtype), rows)[:, 0]


@repeatable
def _d_weights(values: Tensor, places: Tensor, dy: Tensor) -> Tensor:
    """The products of dy (queries, D) with the rows of values (rows, D) at the places (queries, k)."""
    rows = values.index_select(0, places.flatten()).view(*places.shape, -1)
    return torch.bmm(rows, dy[..., None])[..., 0]


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sizes: Memory) -> Tensor:
        sequences, seq_len, channels = q.shape
        reach, group = sizes.reach(seq_len), sequences // len(k)
        count = sizes.most_read(seq_len)
        wide = torch.promote_types(q.dtype, torch.float32)
        y = torch.zeros_like(q)
        scores = q.new_full((sequences, seq_len, count), -math.inf, dtype=wide)
        places = torch.zeros(sequences, seq_len, count, dtype=torch.int32, device=q.device)
        padded = F.pad(k.to(wide), (0, 0, reach, 0))  # window of a segment: the M keys before it
        rows = v.reshape(-1, channels)
        owner = torch.arange(sequences, device=q.device) // group
        for piece in _pieces(sequences, seq_len, sizes):
            stop = piece.start + (piece.segments - 1) * sizes.segment + reach
            windows = padded[:, piece.start : stop].unfold(1, reach, sizes.segment).transpose(2, 3)
            own = windows[owner[piece.heads]] if group > 1 else windows[piece.heads]
            missing = reach - piece.start
            found, place = _search(piece.of(q).to(wide), own, missing, count)
            first = torch.arange(piece.segments, device=q.device)[:, None, None] * sizes.segment - missing
            sequence = (owner[piece.heads] * seq_len)[:, None, None, None]
            place = (place + first).clamp_(min=0) + sequence
            weights = found.softmax(-1)
            result = _read(rows, place.flatten(0, 2), weights.flatten(0, 2))
            for target, part in ((y, result), (scores, found), (places, place)):
                into = piece.of(target)
                into.copy_(part.view(into.shape))
        ctx.save_for_backward(q, k, v, scores, places)
        ctx.sizes = sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, places = ctx.saved_tensors
        dq = torch.zeros_like(q)
        keys, values = (t.reshape(-1, q.shape[-1]) for t in (k, v))
        # none in training, where both are detached; the gallery draws from these gradients what is read
        asked = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        of_rows = (torch.zeros_like(keys), torch.zeros_like(values)) if asked else None
        for piece in _pieces(q.shape[0], q.shape[1], ctx.sizes):
            d_rows, place, some = (piece.of(t).flatten(0, 2) for t in (dy, places, scores))
            weights = some.softmax(-1)
            d_weights = _d_weights(values, place, d_rows.to(values.dtype)).to(weights.dtype)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            into = piece.of(dq)
            into.copy_(_read(keys, place, d_scores).view(into.shape))
            if of_rows is not None:
                queries = piece.of(q).flatten(0, 2)
                for of, amounts, read in zip(of_rows, (d_scores, weights), (queries, d_rows), strict=True):
                    shares = (amounts[..., None] * read[:, None]).to(of.dtype)
                    of.index_add_(0, place.flatten(), shares.flatten(0, 1))
        if of_rows is None:
            return dq, None, None, None
        return dq, of_rows[0].view_as(k), of_rows[1].view_as(v), None


def nearest_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Memory) -> Tensor:
    """softmax over the k largest scores q·k of the memory: queries (B, H, T, D), keys and values (B, K, T, D)
    → (B, H, T, D). 0 for the first segment. Only queries have a gradient."""
    batch, heads, seq_len, _ = q.shape
    if not sizes.most_read(seq_len):
        return torch.zeros_like(q)
    with torch.autocast(q.device.type, enabled=False):  # scores decide what is read
        y: Tensor = _Nearest.apply(  # type: ignore[no-untyped-call]
            *(t.flatten(0, 1).contiguous() for t in (q, k.detach(), v.detach())), sizes
        )
    by_head: Tensor = y.unflatten(0, (batch, heads))
    return by_head
