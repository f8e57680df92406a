"""Attention weights that are parameters, the same for all sequences, for `variants.attention.synthesizer`.

Shapes: B batch, T tokens, L ≥ T positions of the parameters, H heads, D channels of a head, k rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.tile_size import Sizes

SCORES = Sizes(cpu=2**20, accelerator=2**27)
"""Scores of one head computed at a time. On a CPU 4 MiB, so that a piece stays near the cache."""
MOST_PIECES = 32
"""Maximum number of pieces of a sequence, which bounds the number of operations."""


def _pieces(seq_len: int, size: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each piece; a causal piece has no key after its last query."""
    rows = max(1, size // seq_len, -(-seq_len // MOST_PIECES))
    for start in range(0, seq_len, rows):
        stop = min(start + rows, seq_len)
        yield slice(start, stop), slice(0, stop if causal else seq_len)


def _weights(left: Tensor, right: Tensor | None, queries: slice, keys: slice, *, is_causal: bool) -> Tensor:
    """Softmax (H, queries, keys) of the scores: rows of R (H, L, L), or of R₁R₂ᵀ ((H, L, k) each)."""
    rows = left[:, queries]
    scores = rows[:, :, keys].clone() if right is None else rows @ right[:, keys].mT
    if is_causal:
        size = queries.stop - queries.start
        later = torch.full((size, size), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
        scores[:, :, keys.stop - size :] += later
    return scores.softmax(dim=-1)


@repeatable
class _Mixed(torch.autograd.Function):
    """Saves only its inputs; the weights of a piece are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, left: Tensor, right: Tensor | None, is_causal: bool, size: int
    ) -> Tensor:
        ctx.save_for_backward(v, left, right)
        ctx.is_causal, ctx.size = is_causal, size
        y = torch.empty_like(v)
        with torch.autocast(v.device.type, enabled=False):
            for queries, keys in _pieces(v.shape[1], size, is_causal):
                weights = _weights(left, right, queries, keys, is_causal=is_causal)
                y[:, queries] = weights @ v[:, keys]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        v, left, right = ctx.saved_tensors
        dv, d_left = torch.zeros_like(v), torch.zeros_like(left)
        d_right = None if right is None else torch.zeros_like(right)
        for queries, keys in _pieces(v.shape[1], ctx.size, ctx.is_causal):
            weights = _weights(left, right, queries, keys, is_causal=ctx.is_causal)
            dv[:, keys] += weights.mT @ dy[:, queries]
            d_scores = dy[:, queries] @ v[:, keys].mT
            d_scores = torch.ops.aten._softmax_backward_data(d_scores, weights, -1, weights.dtype)
            if right is None or d_right is None:
                d_left[:, queries, keys] = d_scores
            else:
                d_left[:, queries] = d_scores @ right[:, keys]
                d_right[:, keys] += d_scores.mT @ left[:, queries]
        return dv, d_left, d_right, None, None


def mixed(v: Tensor, left: Tensor, right: Tensor | None, *, is_causal: bool, device_type: str) -> Tensor:
    """softmax(R) V with scores R = left (H, L, L), or left·rightᵀ ((H, L, k) each): (B, H, T, D) → the same.

    Scores are computed once for all sequences, in pieces of queries. Causal: keys after a query have no
    weight. All have the same dtype, in which everything is computed, also under autocast.
    """
    batch, seq_len = v.shape[0], v.shape[2]
    values = v.permute(1, 2, 0, 3).flatten(2)  # (H, T, B·D): one product for all sequences
    y: Tensor = _Mixed.apply(values, left, right, is_causal, SCORES.on(device_type))  # type: ignore[no-untyped-call]
    return y.view(-1, seq_len, batch, v.shape[3]).permute(2, 0, 1, 3)
