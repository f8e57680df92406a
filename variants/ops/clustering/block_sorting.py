"""Soft sorting of blocks by Sinkhorn normalisation (Tay 2020, arXiv:2002.11296), and its decoding state.

Shapes: B batch, H heads, n blocks of b tokens, m = n − 1, D channels of a head, L maximum length, W = b·D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.base import Clock, DecodingState

PIECES = 4
"""Pieces of the rows of a causal mixture. More pieces multiply by fewer zeros, with more launches."""


def balanced(scores: Tensor, iterations: int) -> Tensor:
    """The logarithm of exp(scores) (B, H, n, n) after alternate normalisation of columns and rows.

    Rows are last, so they sum up to 1; columns do so in the limit.
    """
    for _ in range(iterations):
        scores = scores.log_softmax(-2).log_softmax(-1)
    return scores


def past_only(scores: Tensor) -> Tensor:
    """Scores (B, H, m, m) of the blocks 1 … m with the blocks 0 … m − 1 → weights, 0 for later blocks."""
    block = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill(block > block[:, None], float("-inf")).softmax(-1)


class _MixBlocks(torch.autograd.Function):
    """Lower triangular weights times rows, without most of the upper triangle. Saves its inputs."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weights, rows)
        y = torch.empty_like(rows)
        for first, last in _pieces(rows.shape[2]):
            y[:, :, first:last] = weights[:, :, first:last, :last] @ rows[:, :, :last]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        weights, rows = ctx.saved_tensors
        d_weights, d_rows = torch.zeros_like(weights), torch.zeros_like(rows)
        for first, last in _pieces(rows.shape[2]):
            piece = dy[:, :, first:last]
            d_weights[:, :, first:last, :last] = piece @ rows[:, :, :last].mT
            d_rows[:, :, :last] += weights[:, :, first:last, :last].mT @ piece
        return d_weights, d_rows


def _pieces(rows: int) -> list[tuple[int, int]]:
    step = max(1, -(-rows // PIECES))
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def mix_past(weights: Tensor, rows: Tensor) -> Tensor:
    """Weights (B, H, m, m), 0 above the diagonal, times blocks (B, H, m, W) → (B, H, m, W)."""
    mixed: Tensor = _MixBlocks.apply(weights, rows)  # type: ignore[no-untyped-call]
    return mixed


class SortState(DecodingState):
    """All keys and values without positions (B, L, H, D); sums of the keys of each block (B, H, n, D) and of
    all queries (B, H, D), float32 or wider; the sorted keys and values of the open block (B, H, b, D)."""

    def __init__(
        self,
        clock: Clock,
        max_len: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shape` is (B, H, b, D)."""
        super().__init__(clock, max_len)
        batch, heads, block, head_dim = shape
        wide = torch.promote_types(dtype, torch.float32)
        self.keys, self.values = (
            torch.zeros(batch, max_len, heads, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.key_sums = torch.zeros(batch, heads, -(-max_len // block), head_dim, dtype=wide, device=device)
        self.query_sum = torch.zeros(batch, heads, head_dim, dtype=wide, device=device)
        held = block if max_len > block else 0  # the first block has no sorted block
        self.sorted_keys, self.sorted_values = (
            torch.zeros(batch, heads, held, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
