"""Attention over all rounds of hashing at once, merged by the logsumexp of each (arXiv:2001.04451, §2).

Shapes: B batch, T tokens, H heads, D head_dim, R rounds, N = H·B sequences, P positions of a sequence in a
sorted order (see `variants.ops.lsh.layout`); a piece consists of n sequences with all their rounds.

The mathematics, and the treatment of tokens that are not finite, are those of `variants.ops.lsh.attention`.
There rounds follow each other in small pieces, which suits a cache. Here a kernel gets all rounds of some
sequences in their sorted orders, and returns the softmax of each round and its logsumexp; few launches are
left. Nothing sorted is stored between the passes: the backward pass gathers it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.lsh.attention import MAX_LENGTH
from variants.ops.lsh.flex import FlexRounds
from variants.ops.lsh.hashing import UNIT_EPSILON
from variants.ops.lsh.layout import Layout, lay_out, margin
from variants.ops.lsh.products import Products
from variants.ops.lsh.streams import Kernel, Stream
from variants.ops.lsh.windows import Window
from variants.ops.memoizable import FunctionContext, repeatable
from variants.ops.operators import operator

NO_SCORE = -1e19
"""Logsumexp of no scores: below every score, and far above the logsumexp that a kernel gives then."""
MOST_PIECES = 16
"""Maximum number of pieces; beyond it the pieces grow, which bounds the number of operations."""


KERNELS: Mapping[str, Kernel] = {"merged": Products(), "flex": FlexRounds()}
"""By the word of the knob `impl`."""


@repeatable
class MergedAttention(torch.autograd.Function):
    """As `variants.ops.lsh.attention.LshAttention`, with a kernel of `KERNELS`.

    With x the rows of queries and keys, c_j = 1 / √(D·(‖x_j‖² + ε²)) and s_ij = c_j·x_i·x_j, kernels return
    the gradients g of x as queries and h of x as keys. The factor c_j depends on x_j too. The gradient of x
    is therefore g + h − x·(x·h) / (‖x‖² + ε²).
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, value: Tensor, buckets: Tensor, window: Window, kernel: str) -> Tensor:
        """qk, values (B, T, H, D) and buckets (R, H·B, T) → outputs (B, T, H, D)."""
        batch, seq_len, heads, head_dim = qk.shape
        with torch.autocast(qk.device.type, enabled=False):
            rows = qk.new_empty(
                heads * batch * seq_len + 1, 2, head_dim, dtype=torch.promote_types(qk.dtype, value.dtype)
            )
            query_key, values = rows[:-1].unbind(1)
            query_key.view(heads, batch, seq_len, head_dim).copy_(qk.permute(2, 0, 1, 3))
            values.view(heads, batch, seq_len, head_dim).copy_(value.permute(2, 0, 1, 3))
            rows[-1].zero_()
            wide = torch.promote_types(rows.dtype, torch.float32)
            length = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)
            excluded = ~(length[:-1] <= MAX_LENGTH).all(-1)
            query_key.masked_fill_(excluded[:, None], 0)
            factor = length[:, 0].square().add_(UNIT_EPSILON**2).mul_(head_dim).rsqrt_()
            factor[:-1].masked_fill_(excluded, 0)
            layout = lay_out(buckets, window, excluded, KERNELS[kernel].multiple)
            y = torch.empty_like(query_key, memory_format=torch.contiguous_format)
            lse = torch.zeros_like(factor)  # of the scores of all rounds
            decisions = KERNELS[kernel].new_decisions(*layout.orders, layout.positions(window), window, rows)
            for piece in _pieces(layout, window, kernel, head_dim, backward=False):
                _attend(piece, layout, rows, factor, y, lse, decisions)
            y.addcmul_(values, layout.isolated[:, None])
            y = y.view(heads, batch, seq_len, head_dim).permute(1, 2, 0, 3).to(value.dtype).contiguous()
        ctx.save_for_backward(y, rows, factor, lse, decisions, *layout)
        ctx.window, ctx.kernel, ctx.dtypes = window, kernel, (qk.dtype, value.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qk and values."""
        y, rows, factor, lse, decisions, *decided = ctx.saved_tensors
        layout = Layout(*decided)
        batch, seq_len, heads, head_dim = y.shape
        with torch.autocast(rows.device.type, enabled=False):
            length = torch.linalg.vector_norm(grad, dim=-1, dtype=factor.dtype).permute(2, 0, 1).flatten()
            excluded = layout.marked | ~(length <= MAX_LENGTH)
            mean = (grad.to(factor.dtype) * y).sum(-1).permute(2, 0, 1).flatten()
            mean = torch.nn.functional.pad(mean.masked_fill_(excluded, 0), (0, 1))
            grads = rows.new_empty(len(rows), head_dim)
            grads[:-1].view(heads, batch, seq_len, head_dim).copy_(grad.permute(2, 0, 1, 3))
            grads[:-1].masked_fill_(excluded[:, None], 0)
            grads[-1].zero_()
            undefined = excluded & (length != 0)
            square = factor.square()  # 1 / (D·(‖x‖² + ε²))
            square[:-1].masked_fill_(undefined, math.nan)  # and so are the gradients of query-keys
            total = tuple(rows.new_empty(len(rows) - 1, head_dim) for _ in range(2))
            for piece in _pieces(layout, ctx.window, ctx.kernel, head_dim, backward=True):
                _attend_backward(piece, layout, rows, factor, lse, decisions, square, grads, mean, *total)
            alone = torch.where(undefined, math.nan, layout.isolated)
            total[1].addcmul_(grads[:-1], alone[:, None])
            grad_qk, grad_value = (
                x.view(heads, batch, seq_len, head_dim).permute(1, 2, 0, 3).to(dtype)
                for x, dtype in zip(total, ctx.dtypes, strict=True)
            )
        return grad_qk, grad_value, None, None, None


@dataclass(frozen=True)
class _Piece:
    """A range of sequences."""

    window: Window
    kernel: str
    first: int
    end: int

    @property
    def rows(self) -> slice:
        """The rows of its sequences."""
        return slice(self.first * self.window.seq_len, self.end * self.window.seq_len)

    @property
    def sequences(self) -> slice:
        """Its sequences."""
        return slice(self.first, self.end)


def _pieces(
    layout: Layout, window: Window, kernel: str, head_dim: int, *, backward: bool
) -> Iterator[_Piece]:
    """Pieces of nearly equal size."""
    sequences, rounds = layout.orders
    most = KERNELS[kernel].sequences(rounds, layout.positions(window), window, head_dim, backward=backward)
    count = min(-(-sequences // max(most, 1)), MOST_PIECES)
    step = -(-sequences // count)
    for first in range(0, sequences, step):
        yield _Piece(window, kernel, first, min(first + step, sequences))


def _positions(piece: _Piece, layout: Layout) -> slice:
    """The positions of a piece, with a margin: padding, or positions of other sequences."""
    of_sequence = layout.orders[1] * layout.positions(piece.window)
    return slice(piece.first * of_sequence, piece.end * of_sequence + 2 * margin(piece.window))


def _stream(piece: _Piece, layout: Layout, rows: Tensor, factor: Tensor) -> Stream:
    """The sorted rows of a piece."""
    here = _positions(piece, layout)
    index = layout.order[here]
    return Stream(
        window=piece.window,
        shape=(piece.end - piece.first, layout.orders[1], layout.positions(piece.window)),
        margin=margin(piece.window),
        row=index,
        rows=rows.index_select(0, index),
        factor=factor.index_select(0, index),
        code=layout.code.index_select(1, index),
        own=layout.own[here],
    )


def _places(piece: _Piece, layout: Layout) -> Tensor:
    """(n·R·T,): the position of each token in the stream of the piece, without the margin."""
    place, first = layout.place[piece.sequences].flatten(), _positions(piece, layout).start
    return place - first if first else place


@repeatable
def _attend(
    piece: _Piece,
    layout: Layout,
    rows: Tensor,
    factor: Tensor,
    y: Tensor,
    lse: Tensor,
    decisions: Tensor,
) -> None:
    """Write the outputs of the rows of a piece, and the logsumexp of their scores in all rounds."""
    rounds, seq_len = layout.orders[1], piece.window.seq_len
    stream = _stream(piece, layout, rows, factor)
    sums, top, of_rounds = KERNELS[piece.kernel].forward(stream, decisions[piece.sequences])
    del stream
    place = _places(piece, layout)
    by_row = of_rounds.index_select(0, place).view(-1, rounds, seq_len)
    total = by_row.logsumexp(1).flatten().clamp_min_(NO_SCORE)
    lse[piece.rows] = total
    total = total.masked_fill(layout.marked[piece.rows], math.nan).view(-1, 1, seq_len)
    share = top.index_select(0, place).view(-1, rounds, seq_len).sub_(total).exp_()
    parts = sums.index_select(0, place).view(-1, rounds, seq_len, sums.shape[-1])
    torch.sum(parts.mul_(share[..., None]), dim=1, out=y[piece.rows].view(-1, seq_len, sums.shape[-1]))


@repeatable
def _attend_backward(
    piece: _Piece,
    layout: Layout,
    rows: Tensor,
    factor: Tensor,
    lse: Tensor,
    decisions: Tensor,
    square: Tensor,
    grads: Tensor,
    mean: Tensor,
    of_query_key: Tensor,
    of_value: Tensor,
) -> None:
    """Write the gradients of the rows of a piece, (rows, D): of their query-keys and of their values."""
    rounds, seq_len, head_dim = layout.orders[1], piece.window.seq_len, grads.shape[-1]
    stream = _stream(piece, layout, rows, factor)
    grad_query, grad_key, grad_value = KERNELS[piece.kernel].backward(
        stream,
        decisions[piece.sequences],
        lse.index_select(0, stream.row),
        grads.index_select(0, stream.row),
        mean.index_select(0, stream.row),
    )
    del stream
    place = _places(piece, layout)

    def parts(x: Tensor) -> Tensor:
        return x.index_select(0, place).view(-1, rounds, seq_len, head_dim)

    of_query_key, of_value = (x[piece.rows].view(-1, seq_len, head_dim) for x in (of_query_key, of_value))
    torch.sum(parts(grad_value), 1, out=of_value)
    del grad_value
    query_key = rows[:-1][piece.rows, 0].view_as(of_value)
    of_keys = parts(grad_key).sum(1, dtype=factor.dtype)
    del grad_key
    # c_j depends on x_j: see `MergedAttention`
    along = (of_keys * query_key).sum(-1).mul_(square[piece.rows].view(-1, seq_len))
    of_keys.addcmul_(query_key, along[..., None], value=-head_dim)
    torch.add(of_keys, parts(grad_query).sum(1, dtype=factor.dtype), out=of_query_key)


# --- operators for torch.compile, which would compute wrong gradients of queries if it traced the code ---


def _forward(qk: Tensor, value: Tensor, buckets: Tensor, window: list[int], kernel: str) -> list[Tensor]:
    """The tensors that `MergedAttention` saves for its backward pass, the outputs first."""
    ctx = FunctionContext()
    MergedAttention.forward(ctx, qk, value, buckets, Window(*window), kernel)  # type: ignore[arg-type]
    return list(ctx.saved_tensors)


def _backward(
    grad: Tensor, saved: list[Tensor], window: list[int], kernel: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of query-keys, in this dtype, and of values."""
    ctx = FunctionContext(
        saved_tensors=tuple(saved),
        window=Window(*window),  # type: ignore[arg-type]
        kernel=kernel,
        dtypes=(dtype, grad.dtype),
    )
    grad_qk, grad_value, *_ = MergedAttention.backward(ctx, grad)
    assert grad_qk is not None
    assert grad_value is not None
    return grad_qk, grad_value


_forward_operator = operator(
    "merged_rounds",
    _forward,
    schema="(Tensor qk, Tensor value, Tensor buckets, SymInt[] window, str kernel) -> Tensor[]",
)
_backward_operator = operator(
    "merged_rounds_backward",
    _backward,
    schema="(Tensor grad, Tensor[] saved, SymInt[] window, str kernel, ScalarType dtype) -> (Tensor, Tensor)",
)
_forward_operator.register_fake(_forward)
_backward_operator.register_fake(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.window, ctx.kernel, ctx.dtype = inputs[3], inputs[4], inputs[0].dtype


def _operator_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    given = grads[0], list(ctx.saved_tensors), ctx.window, ctx.kernel, ctx.dtype
    return *_backward_operator(*given), None, None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_save)


def merged_attention(qk: Tensor, value: Tensor, buckets: Tensor, window: Window, kernel: str) -> Tensor:
    """Softmax attention over the rounds of hashing: (B, T, H, D) → (B, T, H, D). See `MergedAttention`."""
    y: Tensor
    if torch.compiler.is_compiling():
        y = _forward_operator(qk, value, buckets, window.numbers, kernel)[0]
    else:  # operation by operation, so that counters see all computation and memory
        y = MergedAttention.apply(qk, value, buckets, window, kernel)  # type: ignore[no-untyped-call]
    return y
