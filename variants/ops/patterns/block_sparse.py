"""One softmax over the union of several sets of keys, each of which is computed separately.

Shapes: B batch, T tokens, C channels, H heads, D channels of a head.

The pairs are divided into disjoint *parts*: rectangles or triangles of (query, key) pairs over strided views
of the sequence. The partial results are combined by their logsumexp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.patterns.part_kernels import EMPTY, KERNELS
from variants.ops.patterns.strided_parts import Part, flatten_parts, packed, unflatten_parts


def _rows_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros with the shape of x (B, H, T, D), in the layout (B, T, H, D) that projections read."""
    batch, heads, seq_len, channels = x.shape
    return torch.zeros(batch, seq_len, heads, channels, dtype=dtype, device=x.device).transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], impl: str, piece: int
) -> tuple[Tensor, Tensor]:
    """Return outputs (B, H, T, D) and the logsumexp of all scores of each query (B, H, T)."""
    # sums over parts are float32 or wider, because each part adds a rounding error
    wide = torch.promote_types(q.dtype, torch.float32)
    y = _rows_like(q, wide)
    lse = torch.full(q.shape[:3], EMPTY, dtype=wide, device=q.device)
    for part in parts:
        bias = part.bias(q)
        by_query, by_key = ([t[:, slice(*part.heads)] for t in some] for some in ((q, y, lse), (k, v)))
        for queries, keys in part.pieces(piece):
            views = [queries.view(t) for t in by_query] + [keys.view(t) for t in by_key]
            _attend_piece(views, bias, part.causal, impl)
    return y.to(q.dtype), lse


@repeatable
def _attend_piece(views: list[Tensor], bias: Tensor | None, causal: bool, impl: str) -> None:
    """Merge the softmax over some keys into y and lse; all are views (B, G, H, rows, run, …)."""
    q, y, lse, k, v = views
    y_part, lse_part = KERNELS[impl].attend(packed(q), packed(k), packed(v), bias, causal)
    y_part, lse_part = y_part.reshape(y.shape), lse_part.reshape(lse.shape)
    weight = (lse_part - lse).sigmoid_()
    y.lerp_(y_part.to(y.dtype), weight[..., None])
    lse.copy_(torch.logaddexp(lse, lse_part))


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    parts: Sequence[Part],
    impl: str,
    piece: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v (B, H, T, D).

    They follow from the weights exp(score − logsumexp of all scores), without the partial results. So of
    tensors as long as the sequence, only q, k, v, y and lse are saved.
    """
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()  # the kernel needs rows without gaps
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = [_rows_like(t, wide) for t in (q, k, v)]
    y = KERNELS[impl].of_outputs(dy, y)
    for part in parts:
        bias = part.bias(q)
        by_query, by_key = (
            [t[:, slice(*part.heads)] for t in some]
            for some in ((dy, q, y, lse, grads[0]), (k, v, grads[1], grads[2]))
        )
        for queries, keys in part.pieces(piece):
            views = [queries.view(t) for t in by_query] + [keys.view(t) for t in by_key]
            _attend_piece_backward(views, bias, part.causal, impl)
    dq, dk, dv = (grad.to(q.dtype) for grad in grads)
    return dq, dk, dv


@repeatable
def _attend_piece_backward(views: list[Tensor], bias: Tensor | None, causal: bool, impl: str) -> None:
    """Add the contribution of a piece to the gradients dq, dk and dv; views as in `_attend_piece`."""
    dy, q, y, lse, dq, k, v, dk, dv = views
    rows = (packed(t) for t in (dy, q, k, v, y, lse))
    grads = KERNELS[impl].attend_backward(*rows, bias, causal)
    for total, grad in zip((dq, dk, dv), grads, strict=True):
        total.add_(grad.reshape(total.shape))


@repeatable
class _UnionAttention(torch.autograd.Function):
    """One softmax over the keys of all parts, combined from the softmax of each part by its logsumexp."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        numbers: list[int],
        impl: str,
        piece: int,
        *masks: Tensor,
    ) -> Tensor:
        y, lse = _forward(q, k, v, unflatten_parts(masks, numbers), impl, piece)
        ctx.save_for_backward(q, k, v, y, lse, *masks)
        ctx.numbers, ctx.impl, ctx.piece = numbers, impl, piece
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse, *masks = ctx.saved_tensors
        parts = unflatten_parts(masks, ctx.numbers)
        grads = _backward(dy, q, k, v, y, lse, parts, ctx.impl, ctx.piece)
        return *grads, None, None, None, *[None] * len(masks)


# --- operators for torch.compile, which cannot trace writes through `as_strided` --------------------------

_forward_operator = operator(
    "union_attention",
    lambda q, k, v, masks, numbers, impl, piece: _forward(
        q, k, v, unflatten_parts(masks, numbers), impl, piece
    ),
    schema="(Tensor q, Tensor k, Tensor v, Tensor[] masks, SymInt[] numbers, str impl, SymInt piece)"
    " -> (Tensor, Tensor)",
)
_backward_operator = operator(
    "union_attention_backward",
    lambda dy, q, k, v, y, lse, masks, numbers, impl, piece: _backward(
        dy, q, k, v, y, lse, unflatten_parts(masks, numbers), impl, piece
    ),
    schema="(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor[] masks, SymInt[] numbers,"
    " str impl, SymInt piece) -> (Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _forward_shapes(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _rows_like(q, q.dtype), q.new_empty(q.shape[:3], dtype=wide)


@_backward_operator.register_fake
def _backward_shapes(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_like(q, q.dtype), _rows_like(k, q.dtype), _rows_like(v, q.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, masks, ctx.numbers, ctx.impl, ctx.piece = inputs
    ctx.save_for_backward(q, k, v, *output, *masks)


def _operator_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, y, lse, *masks = ctx.saved_tensors
    grads = _backward_operator(dy, q, k, v, y, lse, masks, ctx.numbers, ctx.impl, ctx.piece)
    return *grads, [None] * len(masks), None, None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_save)


def _flops(q: Tensor, numbers: Sequence[int], products: int) -> int:
    """FLOPs of `products` products of queries × keys × channels in each part; causal parts are triangles."""
    pairs = sum(part.pairs for part in unflatten_parts([], numbers))
    return 2 * products * q.shape[0] * q.shape[-1] * pairs


@register_flop_formula(torch.ops.longctx_bench.union_attention, get_raw=True)
def _forward_flops(
    q: Tensor, k: Tensor, v: Tensor, masks: Any, numbers: Sequence[int], *_: Any, **__: Any
) -> int:
    return _flops(q, numbers, 2)


@register_flop_formula(torch.ops.longctx_bench.union_attention_backward, get_raw=True)
def _backward_flops(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    masks: Any,
    numbers: Any,
    *_: Any,
    **__: Any,
) -> int:
    return _flops(q, numbers, 5)


def union_attention(
    q: Tensor, k: Tensor, v: Tensor, parts: list[Part], impl: str, piece: int = 2**12
) -> Tensor:
    """Softmax attention over the union of the keys of all parts: (B, H, T, D) → (B, H, T, D).

    k and v may be longer than q. A query without a key gives 0. `impl` is one of `KERNELS`; `piece` is the
    number of queries computed at a time (see `piece_size`).
    """
    y: Tensor
    masks, numbers = flatten_parts(parts)
    if torch.compiler.is_compiling():
        y, _ = _forward_operator(q, k, v, masks, numbers, impl, piece)
    else:  # operation by operation, so that counters see all computation and memory
        y = _UnionAttention.apply(q, k, v, numbers, impl, piece, *masks)  # type: ignore[no-untyped-call]
    return y
