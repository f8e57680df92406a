"""Convolution of each head along the length with one filter, as products of matrices.

Not by torch's convolution: on a CPU, torch 2.13 with oneDNN returns wrong gradients of the filters of a
depthwise convolution in float32 for some lengths (301 tokens and 33 taps, for example: 5 % off). Products
also take a quarter of its time.

Shapes: B batch, H heads, T tokens, D channels of a head, w taps, b = w − 1 tokens of a block, n blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable

OVERHEAD = "a convolution is computed in blocks, by matrices of which half of the entries are zero"


def taps_within(width: int, seq_len: int) -> int:
    """Return the number of the w taps by which some token of a sequence reads a token of it."""
    return min(width, 2 * seq_len - 1)


def taps_flops(width: int, seq_len: int) -> int:
    """Return the FLOPs of a channel of a sequence, taps beyond its ends included.

    A single tap is a factor and no product of matrices: 0.
    """
    taps = taps_within(width, seq_len)
    return 2 * seq_len * taps if taps > 1 else 0


def depthwise(x: Tensor, filters: Tensor) -> Tensor:
    """y_t = Σ_i filters_i · x_{t + i − w // 2}, where x is 0 outside: (B, H, T, D) and (H, w) → (B, H, T, D).

    w is odd. The filter of a head is used for all its channels. Only the two inputs are saved for backward.
    """
    unused = (filters.shape[1] - taps_within(filters.shape[1], x.shape[2])) // 2
    filters = filters[:, unused : filters.shape[1] - unused]
    if filters.shape[1] == 1:
        return x * filters[:, :, None]
    y: Tensor = _Depthwise.apply(x, filters.to(x.dtype))  # type: ignore[no-untyped-call]
    return y


def _blocks(x: Tensor, size: int, before: int) -> Tensor:
    """(B, H, T, D) → blocks (H, b, B, n + 1, D) of the sequence, which starts at token `before`; else 0."""
    batch, heads, seq_len, head_dim = x.shape
    count = -(-seq_len // size) + 1
    padded = F.pad(x.transpose(1, 2), (0, 0, 0, 0, before, count * size - seq_len - before))
    by_offset: Tensor = padded.unflatten(1, (count, size)).permute(3, 2, 0, 1, 4)
    return by_offset.reshape(heads, size, batch, count, head_dim)


def _taps(filters: Tensor) -> Tensor:
    """Matrices (2, H, b, b): the taps by which tokens of a block read this block, and the next one."""
    heads, width = filters.shape
    size = width - 1
    # rows of w + b entries, read as rows of one entry less: each is the row before, one entry to the right
    rows = F.pad(filters, (0, size))[:, None].expand(heads, size, width + size).reshape(heads, -1)
    shifted = rows[:, : size * (2 * size)].view(heads, size, 2 * size)
    return torch.stack(shifted.split(size, dim=2))


def _convolved(x: Tensor, filters: Tensor) -> Tensor:
    seq_len, size = x.shape[2], filters.shape[1] - 1
    blocks = _blocks(x, size, size // 2)
    this, following = (
        torch.bmm(taps, blocks.flatten(2)).view_as(blocks) for taps in _taps(filters).unbind(0)
    )
    y = this[:, :, :, :-1].add_(following[:, :, :, 1:])  # (H, b, B, n, D)
    return y.permute(2, 3, 1, 0, 4).flatten(1, 2)[:, :seq_len].transpose(1, 2)


@repeatable
class _Depthwise(torch.autograd.Function):
    """The gradient of x is the convolution with the reversed filter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(x, filters)
        return _convolved(x, filters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, filters = ctx.saved_tensors
        return _convolved(dy, filters.flip(1)), _tap_gradients(x, dy, filters.shape[1] - 1)


def _tap_gradients(x: Tensor, dy: Tensor, size: int) -> Tensor:
    """Gradients (H, w) of the filters; a function, so that its temporaries are freed."""
    blocks, d_blocks = _blocks(x, size, size // 2), _blocks(dy, size, 0)[:, :, :, :-1]
    d_rows = d_blocks.flatten(2)  # (H, b, B·n·D)
    d_taps = [torch.bmm(d_rows, part.flatten(2).mT) for part in (blocks[:, :, :, :-1], blocks[:, :, :, 1:])]
    # the transpose of `_taps`: entry (row, row + i) of both matrices side by side belongs to tap i
    table = F.pad(torch.cat(d_taps, dim=2).flatten(1), (0, size)).unflatten(1, (size, 2 * size + 1))
    taps: Tensor = table[:, :, : size + 1].sum(dim=1)
    return taps
