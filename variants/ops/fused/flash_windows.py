"""Sliding windows by flash attention, one launch for each dilation.

*Untried* on a device: see `flash`.

Shapes: B batch, T tokens, H heads, D channels of a head; (B, T, H, D) for queries, keys, values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.fused.flash import Packing, flash_attention


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, dilations: Sequence[int], causal: bool
) -> Tensor:
    """Softmax attention to keys at a distance of less than `window` steps: (B, T, H, D) → (B, T, H, D).

    `dilations` has the size of a step for each head, in tokens. If all are 1, nothing is copied.
    """
    distinct = sorted(set(dilations))
    if len(distinct) == 1:
        return _dilated((q, k, v), window, distinct[0], causal)
    groups = [[h for h, dilation in enumerate(dilations) if dilation == step] for step in distinct]
    parts = [
        _dilated([_heads(t, heads) for t in (q, k, v)], window, step, causal)
        for step, heads in zip(distinct, groups, strict=True)
    ]
    order = torch.tensor([h for heads in groups for h in heads], device=q.device)
    return _reordered(torch.cat(parts, dim=2), order.argsort(), order, dim=2)


def _heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Some heads of x (B, T, H, D): a view if they are evenly spaced."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if list(heads) == list(range(heads[0], heads[-1] + 1, step)):
        return x[:, :, heads[0] : heads[-1] + 1 : step]
    return x[:, :, list(heads)]


def _dilated(qkv: Sequence[Tensor], window: int, dilation: int, causal: bool) -> Tensor:
    """A dilated window is an undilated one on each of the interleaved subsequences, which are packed."""
    (batch, seq_len), reach = qkv[0].shape[:2], (window - 1, window - 1)
    if dilation == 1:
        return flash_attention(*qkv, causal=causal, window=reach)
    order = (torch.arange(seq_len, device=qkv[0].device) % dilation).argsort(stable=True)
    back = order.argsort()
    q, k, v = (_reordered(t, order, back, dim=1).flatten(0, 1) for t in qkv)
    lengths = [-(-(seq_len - first) // dilation) for first in range(min(dilation, seq_len))] * batch
    y = flash_attention(q, k, v, causal=causal, window=reach, packing=Packing.of(lengths))
    return _reordered(y.unflatten(0, (batch, seq_len)), back, order, dim=1)


def _reordered(x: Tensor, order: Tensor, inverse: Tensor, *, dim: int) -> Tensor:
    """x by the indices of a permutation."""
    y: Tensor = _Reordered.apply(x, order, inverse, dim)  # type: ignore[no-untyped-call]
    return y


class _Reordered(torch.autograd.Function):
    """`index_select` by a permutation. Its gradient is gathered by the inverse; torch would add it up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return dy.index_select(ctx.dim, inverse), None, None, None
