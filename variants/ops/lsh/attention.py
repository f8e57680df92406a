"""Attention over the rounds of locality-sensitive hashing, without storing a round (arXiv:2001.04451, §2).

Shapes: B batch, T tokens, H heads, D head_dim, R rounds. A piece consists of n blocks of b queries in sorted
order and the L keys at the same positions, of which each block reads K (see `variants.ops.lsh.windows`).

Each round computes the scores of its windows once in the forward pass and once more in the backward pass,
piece by piece. Between the passes only the unit vectors, the values, the outputs, one normaliser for each row
and the sorted orders are stored: no gathered copy, and nothing that grows with rounds × channels.

Blocks contain keys that their queries must not read: keys of later tokens, of other buckets, of the next
sequence. The weight of such a pair is exactly 0. Every number in a block is finite, so the pair adds exactly
0. Rows that are not finite are therefore replaced by zeros; their outputs are set to NaN, and so are the
outputs of all rows that read them: `Rounds.marked`, found by counting in the sorted order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.lsh.hashing import inverse_length
from variants.ops.lsh.pieces import MIN_EXPONENT, Piece, PieceIndices, Workspace
from variants.ops.lsh.windows import Rounds, Window, sort_rows
from variants.ops.memoizable import FunctionContext, repeatable
from variants.ops.operators import operator

NO_SCORE = -1e19
"""Maximum of no scores: below every score, which is at most `MAX_LENGTH`, and far above −FORBIDDEN."""
MAX_LENGTH = 9e18
"""Maximum length of a vector in the computation. By the Cauchy–Schwarz inequality, products of two such
vectors are finite in float32."""
OUTPUT_INDEX = 4
"""Index of the outputs among the tensors that the forward pass saves."""
LARGE_NORMALISER = 1e30
"""A normaliser with which every weight is 0."""


@repeatable
class LshAttention(torch.autograd.Function):
    """Softmax attention of shared queries and keys over the union of the keys of all rounds.

    qk and values (B, T, H, D), buckets (R, H·B, T) → (B, T, H, D). The score of query i and key j is
    q_i·k_j/√D with k_j = q_j/√(‖q_j‖² + ε²). The output of a token that reads no other token in any round is
    its own value.

    Rounds are combined as in Kitaev 2020, §2 "Multi-round LSH attention": o = Σ_r exp(z_r − z)·o_r, where z_r
    is the logsumexp of the scores of round r. Here this is a running maximum and a running normaliser. In the
    paper a pair that N rounds read has the weight 1/N in each of them. Here it has the weight 1 in the first
    of them and 0 in the others. The sums are equal, and this needs only the codes of the earlier rounds.

    If the query-key or the value of a token contains an infinity or a NaN, or values so large that their
    products with gradients would overflow, the outputs of this token and of the tokens that read it are NaN;
    no other output is. The gradient of a token is NaN if its output is NaN and has a gradient other than 0,
    or if the gradient of its output is not finite. It then adds nothing to the gradients of its keys.
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, value: Tensor, buckets: Tensor, window: Window) -> Tensor:
        """qk, values (B, T, H, D) and buckets (R, H·B, T) → outputs (B, T, H, D)."""
        heads, head_dim = qk.shape[2:]
        with torch.autocast(qk.device.type, enabled=False):
            wide = torch.promote_types(qk.dtype, torch.float32)
            query, value_rows = qk.reshape(-1, head_dim).to(wide), value.reshape(-1, head_dim)
            excluded = ~(_is_usable(_length(query)) & _is_usable(_length(value_rows)))
            inverse = _with_zeros(inverse_length(query), excluded)
            key, values = _with_zeros(query, excluded, inverse[:-1]), _with_zeros(value_rows, excluded)
            inverse = inverse.squeeze(1)
            scale = (1 / (inverse * math.sqrt(head_dim))).masked_fill_(inverse == 0, 0)
            rounds = sort_rows(buckets, window, heads, torch.nn.functional.pad(excluded, (0, 1)))
            y, normaliser = _attend(Workspace(window, rounds, key, scale, values))
            y = y.masked_fill_(rounds.marked[:-1, None], math.nan).to(value.dtype).view_as(value)
        ctx.save_for_backward(key, inverse, scale, values, y, normaliser, *rounds)
        ctx.window, ctx.dtypes = window, (qk.dtype, value.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qk and values."""
        key, inverse, scale, values, y, normaliser, *decided = ctx.saved_tensors
        rounds = Rounds(*decided)
        with torch.autocast(key.device.type, enabled=False):
            workspace = Workspace(ctx.window, rounds, key, scale, values)
            grad_y = grad.reshape(-1, key.shape[1]).to(key.dtype)
            length = _length(grad_y)
            excluded = rounds.marked[:-1] | ~_is_usable(length)
            mean = torch.linalg.vecdot(grad_y, y.view_as(grad_y).to(key.dtype))
            mean = _with_zeros(mean[:, None], excluded).squeeze(1)
            counted = _with_zeros(grad_y, excluded)
            grad_key, radial, grad_value = _attend_backward(workspace, counted, mean, normaliser)
            grad_value.addcmul_(counted, rounds.isolated[:, None])
            del counted
            # grad_key is the gradient of the unit vector, as a key and as a query. Only the component of
            # the query's gradient that is parallel to the query is in `radial` instead.
            parallel = radial / math.sqrt(key.shape[1]) - torch.linalg.vecdot(key, grad_key) * inverse
            grad_qk = grad_key.mul_(inverse[:, None]).addcmul_(key, parallel[:, None])
            grad_qk, grad_value = grad_qk[:-1], grad_value[:-1]
            undefined = (excluded & (length != 0))[:, None]
            grad_qk.masked_fill_(undefined, math.nan)
            grad_value.masked_fill_(undefined, math.nan)
        qk_dtype, value_dtype = ctx.dtypes
        return grad_qk.view_as(y).to(qk_dtype), grad_value.view_as(y).to(value_dtype), None, None


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length


def _is_usable(length: Tensor) -> Tensor:
    """Whether a vector of this length can be used. The length is NaN if the vector contains NaN."""
    return length <= MAX_LENGTH


def _with_zeros(x: Tensor, excluded: Tensor, factor: Tensor | None = None) -> Tensor:
    """(rows, D) times a factor (rows, 1) → (rows + 1, D), with 0 in excluded rows and in the last row."""
    padded = x.new_empty(x.shape[0] + 1, x.shape[1])
    if factor is None:
        padded[:-1] = x
    else:
        torch.mul(x, factor, out=padded[:-1])
    padded[:-1].masked_fill_(excluded[:, None], 0)
    padded[-1].zero_()
    return padded


def _attend(workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Return outputs (rows, D) and the logsumexp of the scores of each row (rows + 1,)."""
    # padding writes to the last row
    y = torch.empty_like(workspace.unit)
    top = torch.full_like(workspace.scale, NO_SCORE)
    total = torch.zeros_like(workspace.scale)
    for indices in workspace.pieces():
        _add_piece(workspace, indices, y, top, total)
    isolated = workspace.rounds.isolated
    y.mul_(total.reciprocal().masked_fill_(isolated, 0)[:, None])
    y.addcmul_(workspace.value, isolated[:, None])
    normaliser = top.add_(total.log()).masked_fill_(isolated, 0)
    normaliser[-1].fill_(LARGE_NORMALISER)
    return y[:-1], normaliser


@repeatable
def _add_piece(workspace: Workspace, indices: PieceIndices, y: Tensor, top: Tensor, total: Tensor) -> None:
    """Update the running outputs, maxima and normalisers of the rows of a piece."""
    piece = Piece(workspace, indices)
    scores = workspace.scores(piece)
    row = piece.queries(piece.order).flatten()
    before = top.index_select(0, row)
    now = torch.maximum(before, scores.amax(dim=-1).flatten())
    weights = workspace.weights(piece, scores, now)
    values = piece.blocks(piece.value)
    here = weights.sum(dim=-1).flatten()
    if piece.round == 0:  # the outputs of the rows are not initialised yet
        summed = torch.bmm(weights, values)
    else:
        rescale = (before - now).clamp_min_(MIN_EXPONENT).exp_()
        here.addcmul_(total.index_select(0, row), rescale)
        summed = y.index_select(0, row).mul_(rescale[:, None]).view(piece.count, -1, y.shape[-1])
        torch.baddbmm(summed, weights, values, out=summed)
    top.index_copy_(0, row, now)
    total.index_copy_(0, row, here)
    y.index_copy_(0, row, summed.flatten(0, 1))


def _attend_backward(
    workspace: Workspace, grad_y: Tensor, mean: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the unit vectors (rows + 1, D) as queries and keys, of the lengths of the
    queries (rows + 1,), and of the values (rows + 1, D).

    `mean` (rows + 1,) is the sum over the weights of a row, each multiplied by its gradient.
    """
    grad_key, grad_value = torch.zeros_like(workspace.unit), torch.zeros_like(workspace.unit)
    radial = torch.zeros_like(workspace.scale)
    for indices in workspace.pieces():
        _add_piece_backward(workspace, indices, grad_y, mean, normaliser, grad_key, radial, grad_value)
    return grad_key, radial, grad_value


@repeatable
def _add_piece_backward(
    workspace: Workspace,
    indices: PieceIndices,
    grad_y: Tensor,
    mean: Tensor,
    normaliser: Tensor,
    grad_key: Tensor,
    radial: Tensor,
    grad_value: Tensor,
) -> None:
    """Add the contribution of a piece to the three gradients."""
    piece = Piece(workspace, indices)
    row, count = piece.queries(piece.order).flatten(), piece.count
    weights = workspace.weights(piece, workspace.scores(piece), normaliser.index_select(0, row))
    grad = grad_y.index_select(0, row).view(count, -1, grad_y.shape[-1])
    piece_value = torch.zeros_like(piece.value)
    piece.add_products(piece_value, weights, grad)
    grad_value.index_add_(0, piece.order, piece_value)
    values = piece.blocks(piece.value).transpose(1, 2)
    grad_scores = torch.bmm(grad, values, out=workspace.scratch(count))
    grad_scores.sub_(mean.index_select(0, row).view(count, -1, 1)).mul_(weights)
    grad_query = torch.bmm(grad_scores, piece.blocks(piece.key))
    parallel = torch.linalg.vecdot(grad_query, piece.queries(piece.key))
    radial.index_add_(0, row, parallel.flatten())
    piece_key = piece_value.zero_()
    piece.queries(piece_key).addcmul_(grad_query, piece.scale)
    piece.add_products(piece_key, grad_scores, piece.query)
    grad_key.index_add_(0, piece.order, piece_key)


# --- operators for torch.compile, which would compute wrong gradients of queries if it traced the code ---


def _forward(qk: Tensor, value: Tensor, buckets: Tensor, window: list[int]) -> list[Tensor]:
    """The tensors that `LshAttention` saves for its backward pass; the outputs are one of them."""
    ctx = FunctionContext()
    LshAttention.forward(ctx, qk, value, buckets, Window(*window))  # type: ignore[arg-type]
    return list(ctx.saved_tensors)


def _backward(
    grad: Tensor, saved: list[Tensor], window: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of query-keys, in this dtype, and of values."""
    ctx = FunctionContext(saved_tensors=tuple(saved), window=Window(*window), dtypes=(dtype, grad.dtype))  # type: ignore[arg-type]
    grad_qk, grad_value, *_ = LshAttention.backward(ctx, grad)
    assert grad_qk is not None
    assert grad_value is not None
    return grad_qk, grad_value


_forward_operator = operator(
    "lsh_attention",
    _forward,
    schema="(Tensor qk, Tensor value, Tensor buckets, SymInt[] window) -> Tensor[]",
)
_backward_operator = operator(
    "lsh_attention_backward",
    _backward,
    schema="(Tensor grad, Tensor[] saved, SymInt[] window, ScalarType dtype) -> (Tensor, Tensor)",
)
_forward_operator.register_fake(_forward)
_backward_operator.register_fake(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.window, ctx.dtype = inputs[-1], inputs[0].dtype


def _operator_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return (
        *_backward_operator(grads[OUTPUT_INDEX], list(ctx.saved_tensors), ctx.window, ctx.dtype),
        None,
        None,
    )


_forward_operator.register_autograd(_operator_backward, setup_context=_save)


def lsh_attention(qk: Tensor, value: Tensor, buckets: Tensor, window: Window) -> Tensor:
    """Softmax attention over the rounds of hashing: (B, T, H, D) → (B, T, H, D). See `LshAttention`."""
    y: Tensor
    if torch.compiler.is_compiling():
        y = _forward_operator(qk, value, buckets, window.numbers)[OUTPUT_INDEX]
    else:  # operation by operation, so that counters see all computation and memory
        y = LshAttention.apply(qk, value, buckets, window)  # type: ignore[no-untyped-call]
    return y
