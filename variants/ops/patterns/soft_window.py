"""Attention in windows whose far end fades: a bias for each distance, which has a gradient.

Shapes: B batch, H heads, T tokens, D channels of a head; n blocks of b queries, J keys of a block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.tile_size import Sizes

PIECE = Sizes(cpu=2**20, accelerator=2**26)
"""Scores computed at a time."""
MOST_PIECES = 16
"""Maximum number of pieces of a sequence. Longer sequences have larger pieces, to bound the operations."""


def block_size(extent: int, seq_len: int) -> int:
    """Queries of a block for windows of `extent` keys: half as many, to compute few keys in vain."""
    return max(1, min(seq_len, extent // 2, 128))


def keys_before(extent: int, block: int) -> int:
    """Keys before a block that its queries may read, rounded up to whole blocks."""
    return -(-(extent - 1) // block) * block


class _Piece(NamedTuple):
    """`blocks` blocks of `size` queries from query `start` on, each with the `keys` keys up to its end."""

    start: int
    blocks: int
    size: int
    keys: int

    def queries(self, x: Tensor) -> Tensor:
        """(B, H, T, D) → (B, H, n, b, D), a view."""
        some = x[:, :, self.start : self.start + self.blocks * self.size]
        view: Tensor = some.unflatten(2, (self.blocks, self.size))
        return view

    def windows(self, x: Tensor) -> Tensor:
        """(B, H, T, D) → the keys of each block (B, H, n, D, J), overlapping views."""
        end = self.start + self.blocks * self.size
        return x[:, :, self.start + self.size - self.keys : end].unfold(2, self.keys, self.size)

    def add_keys(self, total: Tensor, parts: Tensor) -> None:
        """Add the gradients of the keys of each block (B, H, n, J, D), which overlap."""
        first = self.start + self.size - self.keys
        if self.blocks == 1:
            total[:, :, first : first + self.keys] += parts[:, :, 0]
            return
        for begin in range(0, self.keys, self.size):  # whole blocks
            at = first + begin
            rows = total[:, :, at : at + self.blocks * self.size].unflatten(2, (self.blocks, self.size))
            rows += parts[:, :, :, begin : begin + self.size]

    def of_table(self, table: Tensor) -> Tensor:
        """(H, b, J) → the entries of the pairs of a block, a view."""
        end = table.shape[2] - table.shape[1] + self.size
        return table[:, : self.size, end - self.keys : end]


def _pieces(q: Tensor, table: Tensor, device_type: str) -> list[_Piece]:
    """Blocks computed at a time. Those near the start have fewer keys; the last one may be shorter."""
    tokens, block, most_keys = q.shape[2], table.shape[1], table.shape[2]
    whole = tokens // block
    near = min(whole, most_keys // block - 1)  # blocks with fewer keys than others
    found = [_Piece(at * block, 1, block, (at + 1) * block) for at in range(near)]
    each = q.shape[0] * table.numel()
    step = max(1, PIECE.on(device_type) // each, -(-whole // MOST_PIECES))
    inner = range(near, whole, step)
    found += [_Piece(first * block, min(step, whole - first), block, most_keys) for first in inner]
    if rest := tokens % block:
        start = whole * block
        found.append(_Piece(start, 1, rest, min(start, most_keys - block) + rest))
    return found


def _weights(piece: _Piece, q: Tensor, k: Tensor, table: Tensor) -> Tensor:
    """The weights of a piece (B, H, n, b, J)."""
    scores = (piece.queries(q) @ piece.windows(k)).to(table.dtype)
    return scores.mul_(q.shape[-1] ** -0.5).add_(piece.of_table(table)[:, None]).softmax(-1)


class _SoftWindow(torch.autograd.Function):
    """Saves its inputs. Backward computes the weights again, piece by piece."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, device_type: str) -> Tensor:
        ctx.save_for_backward(q, k, v, table)
        ctx.device_type = device_type
        y = torch.empty_like(q)
        for piece in _pieces(q, table, device_type):
            weights = _weights(piece, q, k, table)
            piece.queries(y).copy_(weights.to(v.dtype) @ piece.windows(v).mT)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, table = ctx.saved_tensors
        dq, d_table = torch.empty_like(q), torch.zeros_like(table)
        dk, dv = (torch.zeros_like(t, dtype=table.dtype) for t in (k, v))
        for piece in _pieces(q, table, ctx.device_type):
            weights, d_y = _weights(piece, q, k, table), piece.queries(dy)
            d_weights = (d_y @ piece.windows(v)).to(table.dtype)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            piece.of_table(d_table).add_(d_scores.sum((0, 2)))
            piece.add_keys(dv, weights.to(dy.dtype).mT @ d_y)
            d_scores = d_scores.mul_(q.shape[-1] ** -0.5).to(q.dtype)
            piece.queries(dq).copy_(d_scores @ piece.windows(k).mT)
            piece.add_keys(dk, d_scores.mT @ piece.queries(q))
        return dq, dk.to(k.dtype), dv.to(v.dtype), d_table, None


def soft_window(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *, device_type: str) -> Tensor:
    """Causal softmax attention with a bias for each distance: q, k and v (B, H, T, D) → (B, H, T, D).

    table (H, b, J), float32 or wider, has the biases of the pairs of a block of b queries and its J keys,
    which end with its own tokens: −∞ for a pair that is not allowed. J is a multiple of b; earlier keys are
    not read. A query must be allowed to read itself.
    """
    y: Tensor = _SoftWindow.apply(q, k, v, table, device_type)  # type: ignore[no-untyped-call]
    return y
