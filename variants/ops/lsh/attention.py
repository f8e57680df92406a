"""Attention over the rounds of locality-sensitive hashing, without storing a round.

Shapes: B batch, T tokens, H heads, D head_dim, R rounds. A piece is n blocks of b queries in sorted order
and the L keys under them, of which each block sees K (see `variants.ops.lsh.windows`).

Each round computes the scores of its windows once in the forward pass and once more in the backward
pass, tile by tile. Between the passes only the unit vectors, the values, the outputs, one normaliser a
row and the sorted orders are kept: no gathered copy, and nothing that grows with rounds × channels.

Blocks hold keys that their queries must not read: of later tokens, of other buckets, of the next
sequence. Such a pair weighs exactly 0, and every number in a block is finite, so that it adds exactly
0. A row that is not finite is therefore computed as zeros. Its output is NaN, and so is that of every row
that reads it: `Rounds.marked`, which is found by counting in the sorted order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants.ops.lsh.hashing import inverse_length
from variants.ops.lsh.windows import FORBIDDEN, Rounds, Window, sort_rows
from variants.ops.memoizable import Context, repeatable
from variants.ops.operators import operator

FLOOR = -1e19
"""Maximum of no scores: below every score, which is at most `LONGEST`, and far above −FORBIDDEN."""
SMALLEST = -60.0
"""Exponents are raised to this before the exponential. e⁻⁶⁰ is far under the rounding of the 1 that each
sum holds, and far enough above the smallest normal number that its products with gradients are normal too:
a training step took six times as long where they were not, and the vector exp 35 times over what
underflows."""
NOTHING = 1.001 * math.exp(SMALLEST)
"""Weights up to this become 0."""
LONGEST = 9e18
"""Length of the longest vectors that are computed with: by Cauchy and Schwarz, products of two of them are
finite in float32."""
OUTPUT = 4
"""Place of the outputs among what the forward pass keeps."""
LARGE = 1e30
"""A normaliser beside which every weight is 0."""


@dataclass
class _Tiles:
    """Work space of a pass, and what both passes compute on a piece."""

    window: Window
    rounds: Rounds
    unit: Tensor
    """(rows + 1, D) keys. The last row is 0 and stands for padding, here and below."""
    scale: Tensor
    """(rows + 1,): a query is its key times this, 1/√D included."""
    value: Tensor
    """(rows + 1, D)."""

    def __post_init__(self) -> None:
        window = self.window
        self.forbidden = window.forbidden(self.unit)
        self.sequences = (self.unit.shape[0] - 1) // window.seq_len
        self.pieces = list(window.pieces(self.sequences))
        most = max(count for _, count in self.pieces)
        shape = (most, window.block, window.keys)
        self._scores, self._work = self.unit.new_empty(shape), self.unit.new_empty(shape)
        code = self.rounds.code
        self._codes = [code.new_empty(shape) for _ in range(min(2, len(code) - 1))]

    def places(self) -> Iterator[_Places]:
        """The pieces of all rounds, in order."""
        window = self.window
        for r in range(len(self.rounds.order)):
            for first, count in self.pieces:
                here = slice(first, first + (count - 1) * window.block + window.keys)
                yield _Places(r, count, self.rounds.order[r, here], self.rounds.bucket[r, here])

    def work(self, count: int) -> Tensor:
        """An uninitialised (count, b, K)."""
        return self._work[:count]

    def scores(self, piece: _Piece) -> Tensor:
        """(n, b, K) scores of a piece, hugely negative where its round does not read the pair."""
        scores = self._scores[: piece.count]
        queries, keys = piece.queries(piece.bucket), piece.blocks(piece.bucket)
        if self.window.band:  # all queries of a block are of one bucket
            queries = queries[:, :1]
        apart = self._work.flatten()[: queries.numel() * keys.shape[1]].view(*queries.shape, -1)
        torch.sub(queries[:, :, None], keys[:, None, :], out=apart).abs_()
        torch.sub(self.forbidden, apart, alpha=FORBIDDEN, out=scores)
        # `out=`, because torch's FLOP counter knows no in-place form
        return torch.baddbmm(scores, piece.query, piece.blocks(piece.key).transpose(1, 2), out=scores)

    def weights(self, piece: _Piece, scores: Tensor, top: Tensor) -> Tensor:
        """exp(scores − top (n·b,)), and exactly 0 where this round must not count the pair; in place."""
        weights = scores.sub_(top.view(piece.count, -1, 1)).clamp_min_(SMALLEST).exp_()
        torch.threshold_(weights, NOTHING, 0.0)
        once = self.once(piece)
        return weights if once is None else weights.mul_(once)

    def once(self, piece: _Piece) -> Tensor | None:
        """(n, b, K): 0 where an earlier round reads the pair too, else 1; None in the first round."""
        if piece.round == 0:
            return None
        shift, most = self.window.same
        nearest, work = self._codes[0][: piece.count], self._codes[-1][: piece.count]
        for earlier in range(piece.round):
            code = self.rounds.code[earlier, piece.order]
            queries, keys = piece.queries(code) - shift, piece.blocks(code)
            into = work if earlier else nearest
            torch.sub(queries[:, :, None], keys[:, None, :], out=into)
            into.abs_()
            if earlier:
                torch.minimum(nearest, into, out=nearest)
        return nearest.gt_(most)


class _Places(NamedTuple):
    """Where a piece is."""

    round: int
    blocks: int
    order: Tensor
    """(L,) rows, one past the last at padding."""
    bucket: Tensor
    """(L,)."""


class _Piece:
    """n blocks of queries in one round's sorted order, with the keys under them."""

    def __init__(self, tiles: _Tiles, places: _Places) -> None:
        self.window, self.round, self.count = tiles.window, places.round, places.blocks
        self.order = places.order
        self.bucket = places.bucket.to(tiles.unit.dtype)
        self.key = tiles.unit.index_select(0, self.order)
        self.value = tiles.value.index_select(0, self.order).to(tiles.unit.dtype)
        self.scale = self.queries(tiles.scale.index_select(0, self.order))[:, :, None]
        self.query = self.queries(self.key) * self.scale

    def queries(self, x: Tensor) -> Tensor:
        """The places of queries, by block: (L, …) → (n, b, …), a view."""
        back, block = self.window.back, self.window.block
        return x[back : back + self.count * block].view(self.count, block, *x.shape[1:])

    def blocks(self, x: Tensor) -> Tensor:
        """The keys of every block: (L, …) → (n, K, …), a view, overlapping."""
        return x.unfold(0, self.window.keys, self.window.block).movedim(-1, 1)

    def add_products(self, into: Tensor, weights: Tensor, x: Tensor) -> None:
        """into (L, D) += Σ over queries of weights (n, b, K) · x (n, b, D): each key's, over the blocks
        that see it. In turns, of blocks so far apart that the keys that they see do not overlap."""
        block, keys = self.window.block, self.window.keys
        apart = -(-keys // block)
        for first in range(min(apart, self.count)):
            turn = weights[first::apart]
            seen = into[first * block :].unfold(0, keys, apart * block)[: len(turn)].movedim(-1, 1)
            torch.baddbmm(seen, turn.transpose(1, 2), x[first::apart], out=seen)


@repeatable
class LshAttention(torch.autograd.Function):
    """Softmax attention of shared queries and keys over the union of what the rounds read.

    (qk (B, T, H, D), values likewise, buckets (R, H·B, T), Window) → (B, T, H, D). Query i scores key j
    with q_i·k_j/√D where k_j = q_j/√(‖q_j‖² + ε²). A token that no round gives another token to read
    returns its own value.

    Rounds are combined as in Kitaev 2020, §2 "Multi-round LSH attention": o = Σ_r exp(z_r − z)·o_r with
    z_r the logsumexp of round r's scores, here by a running maximum and normaliser. There, a pair that N
    rounds read weighs 1/N in each; here it weighs 1 in the first of them and 0 in the others. The sums
    are the same, and this one needs only the codes of the earlier rounds.

    A token whose query-key or value holds an infinity or a NaN, or values so large that their products
    with gradients would overflow, gives NaN to itself and to the tokens that read it, and to no other.
    The gradient of a token is NaN where its output is NaN and counts, or where the gradient of its output
    is not finite; it gives none to the tokens that it reads.
    """

    @staticmethod
    def forward(ctx: Any, qk: Tensor, value: Tensor, buckets: Tensor, window: Window) -> Tensor:
        """See the class."""
        heads, head_dim = qk.shape[2:]
        with torch.autocast(qk.device.type, enabled=False):
            wide = torch.promote_types(qk.dtype, torch.float32)
            query, value_rows = qk.reshape(-1, head_dim).to(wide), value.reshape(-1, head_dim)
            lost = ~(_is_short(_length(query)) & _is_short(_length(value_rows)))
            inverse = _with_zeros(inverse_length(query), lost)
            key, values = _with_zeros(query, lost, inverse[:-1]), _with_zeros(value_rows, lost)
            inverse = inverse.squeeze(1)
            scale = (1 / (inverse * math.sqrt(head_dim))).masked_fill_(inverse == 0, 0)
            rounds = sort_rows(buckets, window, heads, torch.nn.functional.pad(lost, (0, 1)))
            y, normaliser = _attend(_Tiles(window, rounds, key, scale, values))
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
            tiles = _Tiles(ctx.window, rounds, key, scale, values)
            grad_y = grad.reshape(-1, key.shape[1]).to(key.dtype)
            length = _length(grad_y)
            lost = rounds.marked[:-1] | ~_is_short(length)
            mean = torch.linalg.vecdot(grad_y, y.view_as(grad_y).to(key.dtype))
            mean = _with_zeros(mean[:, None], lost).squeeze(1)
            counted = _with_zeros(grad_y, lost)
            grad_key, radial, grad_value = _attend_backward(tiles, counted, mean, normaliser)
            grad_value.addcmul_(counted, rounds.alone[:, None])
            del counted
            # Both roles meet in grad_key, as gradients of the unit vector, but for the part of the
            # query's along itself, which is in `radial`.
            along = radial / math.sqrt(key.shape[1]) - torch.linalg.vecdot(key, grad_key) * inverse
            grad_qk = grad_key.mul_(inverse[:, None]).addcmul_(key, along[:, None])
            grad_qk, grad_value = grad_qk[:-1], grad_value[:-1]
            spoilt = (lost & (length != 0))[:, None]
            grad_qk.masked_fill_(spoilt, math.nan)
            grad_value.masked_fill_(spoilt, math.nan)
        qk_dtype, value_dtype = ctx.dtypes
        return grad_qk.view_as(y).to(qk_dtype), grad_value.view_as(y).to(value_dtype), None, None


def _length(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=1)
    return length


def _is_short(length: Tensor) -> Tensor:
    """Whether a vector of this length can be computed with; one that holds a NaN has the length NaN."""
    return length <= LONGEST


def _with_zeros(x: Tensor, lost: Tensor, factor: Tensor | None = None) -> Tensor:
    """(rows, D), times a factor (rows, 1) → (rows + 1, D): 0 in lost rows and in one row more."""
    more = x.new_empty(x.shape[0] + 1, x.shape[1])
    if factor is None:
        more[:-1] = x
    else:
        torch.mul(x, factor, out=more[:-1])
    more[:-1].masked_fill_(lost[:, None], 0)
    more[-1].zero_()
    return more


def _attend(tiles: _Tiles) -> tuple[Tensor, Tensor]:
    """Outputs (rows, D) and the logsumexp of each row's scores (rows + 1,)."""
    # One row more, for what padding writes.
    y = torch.empty_like(tiles.unit)
    top = torch.full_like(tiles.scale, FLOOR)
    total = torch.zeros_like(tiles.scale)
    for places in tiles.places():
        _add_piece(tiles, places, y, top, total)
    alone = tiles.rounds.alone
    y.mul_(total.reciprocal().masked_fill_(alone, 0)[:, None])
    y.addcmul_(tiles.value, alone[:, None])
    normaliser = top.add_(total.log()).masked_fill_(alone, 0)
    normaliser[-1].fill_(LARGE)
    return y[:-1], normaliser


@repeatable
def _add_piece(tiles: _Tiles, places: _Places, y: Tensor, top: Tensor, total: Tensor) -> None:
    """Bring the running outputs, maxima and normalisers of a piece's rows up to date."""
    piece = _Piece(tiles, places)
    scores = tiles.scores(piece)
    row = piece.queries(piece.order).flatten()
    before = top.index_select(0, row)
    now = torch.maximum(before, scores.amax(dim=-1).flatten())
    weights = tiles.weights(piece, scores, now)
    values = piece.blocks(piece.value)
    here = weights.sum(dim=-1).flatten()
    if piece.round == 0:  # every row's first
        summed = torch.bmm(weights, values)
    else:
        kept = (before - now).clamp_min_(SMALLEST).exp_()
        here.addcmul_(total.index_select(0, row), kept)
        summed = y.index_select(0, row).mul_(kept[:, None]).view(piece.count, -1, y.shape[-1])
        torch.baddbmm(summed, weights, values, out=summed)
    top.index_copy_(0, row, now)
    total.index_copy_(0, row, here)
    y.index_copy_(0, row, summed.flatten(0, 1))


def _attend_backward(
    tiles: _Tiles, grad_y: Tensor, mean: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the unit vectors (rows + 1, D) in both roles, of the queries' lengths, of values.

    `mean` (rows + 1,) is the sum of each row's weights times their gradients.
    """
    grad_key, grad_value = torch.zeros_like(tiles.unit), torch.zeros_like(tiles.unit)
    radial = torch.zeros_like(tiles.scale)
    for places in tiles.places():
        _add_piece_backward(tiles, places, grad_y, mean, normaliser, grad_key, radial, grad_value)
    return grad_key, radial, grad_value


@repeatable
def _add_piece_backward(
    tiles: _Tiles,
    places: _Places,
    grad_y: Tensor,
    mean: Tensor,
    normaliser: Tensor,
    grad_key: Tensor,
    radial: Tensor,
    grad_value: Tensor,
) -> None:
    """Add what a piece contributes to the three gradients."""
    piece = _Piece(tiles, places)
    row, count = piece.queries(piece.order).flatten(), piece.count
    weights = tiles.weights(piece, tiles.scores(piece), normaliser.index_select(0, row))
    grad = grad_y.index_select(0, row).view(count, -1, grad_y.shape[-1])
    piece_value = torch.zeros_like(piece.value)
    piece.add_products(piece_value, weights, grad)
    grad_value.index_add_(0, piece.order, piece_value)
    values = piece.blocks(piece.value).transpose(1, 2)
    grad_scores = torch.bmm(grad, values, out=tiles.work(count))
    grad_scores.sub_(mean.index_select(0, row).view(count, -1, 1)).mul_(weights)
    grad_query = torch.bmm(grad_scores, piece.blocks(piece.key))
    along = torch.linalg.vecdot(grad_query, piece.queries(piece.key))
    radial.index_add_(0, row, along.flatten())
    piece_key = piece_value.zero_()
    piece.queries(piece_key).addcmul_(grad_query, piece.scale)
    piece.add_products(piece_key, grad_scores, piece.query)
    grad_key.index_add_(0, piece.order, piece_key)


# --- the same as operators, which the compiler takes whole: traced, gradients of queries come out wrong ---


def _forward(qk: Tensor, value: Tensor, buckets: Tensor, window: list[int]) -> list[Tensor]:
    """What `LshAttention` keeps for its backward pass, outputs among it."""
    ctx = Context()
    LshAttention.forward(ctx, qk, value, buckets, Window(*window))  # type: ignore[arg-type]
    return list(ctx.saved_tensors)


def _backward(
    grad: Tensor, kept: list[Tensor], window: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Gradients of queries, of this dtype, and values."""
    ctx = Context(saved_tensors=tuple(kept), window=Window(*window), dtypes=(dtype, grad.dtype))  # type: ignore[arg-type]
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
    schema="(Tensor grad, Tensor[] kept, SymInt[] window, ScalarType dtype) -> (Tensor, Tensor)",
)
_forward_operator.register_fake(_forward)
_backward_operator.register_fake(_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output)
    ctx.window, ctx.dtype = inputs[-1], inputs[0].dtype


def _operator_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return *_backward_operator(grads[OUTPUT], list(ctx.saved_tensors), ctx.window, ctx.dtype), None, None


_forward_operator.register_autograd(_operator_backward, setup_context=_keep)


def lsh_attention(qk: Tensor, value: Tensor, buckets: Tensor, window: Window) -> Tensor:
    """See `LshAttention`."""
    y: Tensor
    if torch.compiler.is_compiling():
        y = _forward_operator(qk, value, buckets, window.numbers)[OUTPUT]
    else:  # operation by operation, so that counters see what is computed and held
        y = LshAttention.apply(qk, value, buckets, window)  # type: ignore[no-untyped-call]
    return y
