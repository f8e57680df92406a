"""One softmax over the keys of a mask and a few further keys, whose scores are given.

Shapes: B batch, H heads, T tokens, D channels of a head, S further keys.

The parts of a mask give outputs y and the logsumexp of their scores, L. With the further scores s and their
values u, the logsumexp of all is M = log(e^L + Σ e^s), and the output e^(L−M)·y + Σ e^(s−M)·u. The gradients
of the parts follow from the output and the logsumexp of *all* keys, as for parts among each other: so the
backward pass needs no gradient of L, which kernels do not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.patterns import block_sparse
from variants.ops.patterns.strided_parts import Part, flatten_parts, unflatten_parts


@repeatable
class _WithGiven(torch.autograd.Function):
    """Saves its inputs, the output and the logsumexp of all scores."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: Tensor,
        values: Tensor | None,
        numbers: list[int],
        impl: str,
        piece: int,
        *masks: Tensor,
    ) -> Tensor:
        y, lse = _forward(q, k, v, masks, numbers, impl, piece)
        every = torch.logaddexp(lse, scores.logsumexp(-1))
        y.mul_((lse - every).exp_()[..., None])
        if values is not None:
            y.add_((scores - every[..., None]).exp_().to(y.dtype) @ values)
        ctx.save_for_backward(q, k, v, scores, values, y, every, *masks)
        ctx.numbers, ctx.impl, ctx.piece = numbers, impl, piece
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, scores, values, y, every, *masks = ctx.saved_tensors
        grads = _backward(dy, q, k, v, y, every, masks, ctx.numbers, ctx.impl, ctx.piece)
        weights = (scores - every[..., None]).exp_()
        d_weights = -(dy.to(weights.dtype) * y).sum(-1, keepdim=True)  # less dy · y, the mean of all
        d_values = None
        if values is not None:
            d_values = weights.to(dy.dtype).mT @ dy
            d_weights = d_weights + dy @ values.mT
        return *grads, d_weights.mul_(weights), d_values, None, None, None, *[None] * len(masks)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, masks: Any, numbers: list[int], impl: str, piece: int
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, D) and logsumexp (B, H, T) of the parts; one operator while torch compiles."""
    if torch.compiler.is_compiling():
        y, lse = block_sparse._forward_operator(q, k, v, list(masks), numbers, impl, piece)
        return y, lse
    return block_sparse._forward(q, k, v, unflatten_parts(masks, numbers), impl, piece)


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    masks: Any,
    numbers: list[int],
    impl: str,
    piece: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if torch.compiler.is_compiling():
        dq, dk, dv = block_sparse._backward_operator(dy, q, k, v, y, lse, list(masks), numbers, impl, piece)
        return dq, dk, dv
    return block_sparse._backward(dy, q, k, v, y, lse, unflatten_parts(masks, numbers), impl, piece)


def attention_with_given(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    parts: list[Part],
    impl: str,
    piece: int,
    scores: Tensor,
    values: Tensor | None,
) -> Tensor:
    """`union_attention` with S further keys for each query: (B, H, T, D) → (B, H, T, D).

    scores (B, H, T, S), float32 or wider: their scores, −∞ for a key that a query does not read.
    values (B, H, S, D): their values; None: 0. Both have gradients.
    """
    masks, numbers = flatten_parts(parts)
    y: Tensor = _WithGiven.apply(  # type: ignore[no-untyped-call]
        q, k, v, scores, values, numbers, impl, piece, *masks
    )
    return y
