"""Softmax attention by blocks of complete rows of scores, for what fused kernels lack.

Shapes: B batch, H heads, N = B·H, M maps of a head (1 or 2), T tokens, D channels of queries and keys, E
channels of values; n heads, R queries and K keys of a block.

Over 300 lines: both passes, and the operators by which torch.compile runs them.

Each map is a softmax over all keys, or over all keys up to the query. With two maps, the output is that of
the first less a factor times that of the second; both have the same values. With a decay b, b_i − b_j is
added to the scores. Fused kernels want values as wide as keys, so that they would compute each score of two
maps twice; and they have no gradient of a term of the scores.

A few queries at a time have their scores with all keys, in a buffer that stays in cache. So the softmax is
one operation, the values are multiplied once, by the difference of the maps, and the backward pass, which
computes the weights again, needs no other tensor than the inputs.

b is a sum over all tokens and can be large, but the differences that matter are small. So b is float64, and
rounded after b of the first query of the block has been subtracted. Without that, float32 scores would be
wrong by 1/1000 where b is −10,000.

Two maps can be nearly equal, so that rounding errors outweigh their difference. Outputs are therefore float32
or wider, and on a CPU, whose products are no faster in bfloat16, everything else is too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.memoizable import repeatable
from variants.ops.operators import operator
from variants.ops.tile_size import Sizes

ROWS = Sizes(cpu=128, accelerator=1024)
"""Queries of a block."""
SCORES = Sizes(cpu=2**22, accelerator=2**28)
"""Scores computed at a time: as many heads as fit, and at least one."""


def _blocks(shape: torch.Size, causal: bool, rows: int, scores: int) -> Iterator[tuple[slice, slice, slice]]:
    """Heads, queries and keys of each block of queries (M, N, T, D)."""
    maps, heads, tokens, _ = shape
    for first in range(0, tokens, rows):
        end = min(first + rows, tokens)
        keys = end if causal else tokens
        group = max(1, scores // (maps * rows * keys))
        for head in range(0, heads, group):
            yield slice(head, min(head + group, heads)), slice(first, end), slice(0, keys)


class _Buffers:
    """Storage of the scores of a block, used again by the next."""

    def __init__(self, q: Tensor, causal: bool, rows: int, scores: int, count: int) -> None:
        """Of `count` tensors, for queries (M, N, T, D)."""
        sizes = [
            q.shape[0] * (heads.stop - heads.start) * (queries.stop - queries.start) * keys.stop
            for heads, queries, keys in _blocks(q.shape, causal, rows, scores)
        ]
        wide = torch.promote_types(q.dtype, torch.float32)
        self.tensors = [torch.empty(max(sizes), dtype=wide, device=q.device) for _ in range(count)]

    def views(self, shape: tuple[int, ...]) -> list[Tensor]:
        """The buffers as tensors of a shape."""
        return [tensor[: math.prod(shape)].view(shape) for tensor in self.tensors]


def _multiply(a: Tensor, b: Tensor, out: Tensor, scale: float = 1.0, added: Tensor | None = None) -> None:
    """out = added + scale · a @ b, for batches of matrices; out may have a wider dtype."""
    if a.dtype == out.dtype:
        start, beta = (out, 0) if added is None else (added, 1)
        torch.baddbmm(start, a, b, beta=beta, alpha=scale, out=out)
        return
    out.copy_(torch.bmm(a, b)).mul_(scale)
    if added is not None:
        out.add_(added)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, for batches of matrices; total may have a wider dtype."""
    if a.dtype == total.dtype:
        torch.baddbmm(total, a, b, out=total)  # not in place: counters of FLOPs know this operation
    else:
        total.add_(torch.bmm(a, b))


def _weights(q: Tensor, k: Tensor, decay: Tensor | None, buffers: list[Tensor], causal: bool) -> Tensor:
    """The weights (M, n, R, K), in the second of two buffers. decay: (n, 1, K)."""
    scores, weights = buffers
    for one_q, one_k, out in zip(q, k, scores, strict=True):
        _multiply(one_q, one_k.mT, out, q.shape[-1] ** -0.5, decay)
    if causal:  # the last keys are the queries themselves
        rows = q.shape[2]
        later = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
        scores[..., scores.shape[-1] - rows :].masked_fill_(later, -math.inf)
    return torch.softmax(scores, -1, out=weights)


@repeatable
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    factor: Tensor | None,
    y: Tensor,
    buffers: list[Tensor],
    causal: bool,
) -> None:
    """Write the outputs (n, R, E) of a block."""
    weights = _weights(q, k, decay, buffers, causal)
    used = weights[0] if factor is None else weights[0].addcmul_(weights[1], factor, value=-1)
    y.copy_(torch.bmm(used.to(v.dtype), v))


@repeatable
def _attend_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    factor: Tensor | None,
    grads: list[Tensor],
    buffers: list[Tensor],
    causal: bool,
) -> None:
    """Add the gradients of a block: of q and k without the scale, and for the second map without the factor;
    of v, b and the factor."""
    dq, dk, dv, d_decay, d_factor = grads
    weights = _weights(q, k, decay, buffers, causal)
    used, d_weights = weights[0], buffers[0][0]  # the scores are not needed any more
    if factor is not None:
        used = torch.addcmul(weights[0], weights[1], factor, value=-1, out=buffers[0][1])
    _add_product(dv, used.to(dy.dtype).mT, dy)
    _multiply(dy, v.mT, d_weights)
    if factor is not None:
        d_factor.sub_((weights[1] * d_weights).sum())
    for index, weight in enumerate(weights):
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weight, -1, weight.dtype)
        if decay is not None:  # b_i changes no softmax, so that the gradient is that of −b_j
            _add_product(d_decay[:, None], torch.full_like(d_scores[..., :1], -1.0).mT, d_scores)
        d_scores = d_scores.to(q.dtype)
        dq[index].copy_(torch.bmm(d_scores, k[index]))
        _add_product(dk[index], d_scores.mT, q[index])


def _prepared(*tensors: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(B, H, M, T, D) → (M, N, T, D), and (B, H, T, E) → (N, T, E), without gaps."""
    by_head = [t.to(dtype).flatten(0, 1) for t in tensors]
    return [(t.transpose(0, 1) if t.dim() == 4 else t).contiguous() for t in by_head]


def _of_keys(decay: Tensor | None, queries: slice, keys: slice, dtype: torch.dtype) -> Tensor | None:
    """b (n, T) of the first query of a block less b of the keys: (n, 1, K)."""
    if decay is None:
        return None
    return (decay[:, queries.start, None] - decay[:, keys]).to(dtype)[:, None]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    factor: Tensor | None,
    causal: bool,
    rows: int,
    scores: int,
    precise: bool,
) -> Tensor:
    """Outputs (B, H, T, E), in float32 or wider."""
    batch, heads, _, tokens, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    y = torch.empty(batch * heads, tokens, v.shape[-1], dtype=wide, device=v.device)
    q, k, v = _prepared(q, k, v, dtype=wide if precise else q.dtype)
    flat = None if decay is None else decay.flatten(0, 1)
    buffers = _Buffers(q, causal, rows, scores, 2)
    for some, queries, keys in _blocks(q.shape, causal, rows, scores):
        own = q[:, some, queries]
        of_keys = None if flat is None else _of_keys(flat[some], queries, keys, wide)
        views = buffers.views((*own.shape[:3], keys.stop))
        _attend(own, k[:, some, keys], v[some, keys], of_keys, factor, y[some, queries], views, causal)
    by_head: Tensor = y.unflatten(0, (batch, heads))
    return by_head


def _backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    factor: Tensor | None,
    causal: bool,
    rows: int,
    scores: int,
    precise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the decay and the factor; of those that are None, without numbers."""
    batch, heads, _, tokens, head_dim = q.shape
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, dy = _prepared(q, k, v, dy, dtype=wide if precise else dtype)
    flat = None if decay is None else decay.flatten(0, 1)
    dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
    d_decay = torch.zeros(batch * heads, 0 if decay is None else tokens, dtype=wide, device=q.device)
    d_factor = torch.zeros((), dtype=wide, device=q.device)
    buffers = _Buffers(q, causal, rows, scores, 2)
    for some, queries, keys in _blocks(q.shape, causal, rows, scores):
        own = q[:, some, queries]
        _attend_backward(
            dy[some, queries],
            own,
            k[:, some, keys],
            v[some, keys],
            None if flat is None else _of_keys(flat[some], queries, keys, wide),
            factor,
            [dq[:, some, queries], dk[:, some, keys], dv[some, keys], d_decay[some, keys], d_factor],
            buffers.views((*own.shape[:3], keys.stop)),
            causal,
        )
    for grad in (dq, dk):
        grad.mul_(head_dim**-0.5)
        if factor is not None:
            grad[1].mul_(-factor)
    shape = (batch, heads)
    dq, dk = (grad.transpose(0, 1).unflatten(0, shape).to(dtype) for grad in (dq, dk))
    return dq, dk, dv.unflatten(0, shape).to(dtype), d_decay.unflatten(0, shape), d_factor


@repeatable
class _RowBlocks(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor | None,
        factor: Tensor | None,
        causal: bool,
        rows: int,
        scores: int,
        precise: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, decay, factor)
        ctx.sizes = causal, rows, scores, precise
        return _forward(q, k, v, decay, factor, causal, rows, scores, precise)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, decay, factor = ctx.saved_tensors
        grads = _backward(dy, q, k, v, decay, factor, *ctx.sizes)
        return *_of_inputs(grads, decay, factor), None, None, None, None


def _of_inputs(
    grads: tuple[Tensor, ...], decay: Tensor | None, factor: Tensor | None
) -> tuple[Tensor | None, ...]:
    *of_all, d_decay, d_factor = grads
    return (
        *of_all,
        None if decay is None else d_decay.to(decay.dtype),
        None if factor is None else d_factor.to(factor.dtype),
    )


# --- operators for torch.compile, which would trace every block -------------------------------------------

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? factor, bool causal, SymInt rows, SymInt scores, "
    "bool precise"
)
_forward_operator = operator("row_blocks", _forward, schema=f"({_INPUTS}) -> Tensor")
_backward_operator = operator(
    "row_blocks_backward",
    _backward,
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape, dtype=torch.promote_types(q.dtype, torch.float32))


@_backward_operator.register_fake
def _backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, maps, tokens, width = q.shape
    dq, dk = (q.new_empty(maps, batch, heads, tokens, width).permute(1, 2, 0, 3, 4) for _ in range(2))
    d_decay = q.new_empty(batch, heads, 0 if decay is None else tokens, dtype=wide)
    return dq, dk, v.new_empty(v.shape), d_decay, q.new_empty((), dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.sizes = inputs[5:]


def _operator_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    decay, factor = ctx.saved_tensors[3:]
    grads = _backward_operator(dy, *ctx.saved_tensors, *ctx.sizes)
    return *_of_inputs(grads, decay, factor), None, None, None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_save)


def row_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    factor: Tensor | None = None,
    causal: bool,
    device_type: str,
) -> Tensor:
    """Attention of one map or of two: q and k (B, H, M, T, D), v (B, H, T, E) → (B, H, T, E), in float32 or
    wider.

    factor, a number: with two maps, the output is that of the first less `factor` times that of the second.
    decay (B, H, T), float64, only in causal models: b, of which b_i − b_j is added to the scores.
    """
    sizes = min(ROWS.on(device_type), q.shape[3]), SCORES.on(device_type), device_type == "cpu"
    if torch.compiler.is_compiling():
        compiled: Tensor = _forward_operator(q, k, v, decay, factor, causal, *sizes)
        return compiled
    y: Tensor = _RowBlocks.apply(q, k, v, decay, factor, causal, *sizes)  # type: ignore[no-untyped-call]
    return y
