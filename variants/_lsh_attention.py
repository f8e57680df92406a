"""Attention over the rounds of locality-sensitive hashing, without storing a round.

Shapes: B batch, T tokens, H heads, D head_dim, R rounds. A piece is n blocks of b queries in sorted order
and the L keys under them, of which each block sees K (see `variants._lsh`).

Each round computes the scores of its windows once in the forward pass and once more in the backward
pass, tile by tile. Between the passes only the unit vectors, the values, the outputs, one normaliser a
row and the sorted orders are kept: no gathered copy, and nothing that grows with rounds × channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from variants._lsh import FLOOR, FORBIDDEN, SMALLEST, Rounds, Window, unit
from variants._repeats import repeatable


@dataclass
class _Tiles:
    """Work space of a pass, and what both passes compute on a piece."""

    window: Window
    rounds: Rounds
    unit: Tensor
    """(rows, D) keys."""
    scale: Tensor
    """(rows,): a query is its key times this, 1/√D included."""
    value: Tensor
    """(rows, D)."""

    def __post_init__(self) -> None:
        window = self.window
        self.forbidden = window.forbidden(self.unit)
        self.sequences = self.unit.shape[0] // window.seq_len
        self.pieces = list(window.pieces(self.sequences, self.unit.device))
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
        scores, work = self._scores[: piece.count], self.work(piece.count)
        torch.bmm(piece.query, piece.blocks(piece.key).transpose(1, 2), out=scores)
        queries, keys = piece.queries(piece.bucket), piece.blocks(piece.bucket)
        torch.sub(queries[:, :, None], keys[:, None, :], out=work)
        return scores.sub_(work.abs_(), alpha=FORBIDDEN).sub_(self.forbidden)

    def once(self, piece: _Piece) -> Tensor | None:
        """(n, b, K): 0 where an earlier round reads the pair too, else 1; None in the first round."""
        if piece.round == 0:
            return None
        shift, most = self.window.same
        nearest, work = self._codes[0][: piece.count], self._codes[-1][: piece.count]
        for earlier in range(piece.round):
            code = self.rounds.code[earlier, piece.rows]
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
        """For writing."""
        self.rows = places.order.clamp_max(tiles.unit.shape[0] - 1)
        """(L,) rows that exist: for reading."""
        self.bucket = places.bucket.to(tiles.unit.dtype)
        self.key = tiles.unit.index_select(0, self.rows)
        self.value = tiles.value.index_select(0, self.rows).to(tiles.unit.dtype)
        self.scale = self.queries(tiles.scale.index_select(0, self.rows))[:, :, None]
        self.query = self.queries(self.key) * self.scale

    def queries(self, x: Tensor) -> Tensor:
        """The places of queries, by block: (L, …) → (n, b, …), a view."""
        back, block = self.window.back, self.window.block
        return x[back : back + self.count * block].view(self.count, block, *x.shape[1:])

    def blocks(self, x: Tensor, lo: int = 0, hi: int | None = None) -> Tensor:
        """Keys lo to hi of every block: (L, …) → (n, hi − lo, …), a view, overlapping where over b keys."""
        size = (self.window.keys if hi is None else hi) - lo
        return x[lo:].unfold(0, size, self.window.block)[: self.count].movedim(-1, 1)

    def add_products(self, into: Tensor, weights: Tensor, x: Tensor) -> None:
        """into (L, D) += Σ over queries of weights (n, b, K) · x (n, b, D): each key's, over the blocks
        that see it. In strips of b keys, which do not overlap between blocks."""
        block, keys = self.window.block, self.window.keys
        for lo in range(0, keys, block):
            hi = min(lo + block, keys)
            strip = self.blocks(into, lo, hi)
            # `out=`, because torch's FLOP counter knows no in-place form
            torch.baddbmm(strip, weights[:, :, lo:hi].transpose(1, 2), x, out=strip)


@repeatable
class LshAttention(torch.autograd.Function):
    """Softmax attention of shared queries and keys over the union of what the rounds read.

    (qk (B, T, H, D), values likewise, the fields of Rounds, Window) → (B, T, H, D). Query i scores key j
    with q_i·k_j/√D where k_j = q_j/√(‖q_j‖² + ε²). A token that no round gives another token to read
    returns its own value.

    Rounds are combined as in Kitaev 2020, §2 "Multi-round LSH attention": o = Σ_r exp(z_r − z)·o_r with
    z_r the logsumexp of round r's scores, here by a running maximum and normaliser. There, a pair that N
    rounds read weighs 1/N in each; here it weighs 1 in the first of them and 0 in the others. The sums
    are the same, and this one needs only the codes of the earlier rounds.
    """

    @staticmethod
    def forward(
        ctx: Any, qk: Tensor, value: Tensor, order: Tensor, bucket: Tensor, code: Tensor, window: Window
    ) -> Tensor:
        """See the class."""
        with torch.autocast(qk.device.type, enabled=False):
            wide = torch.promote_types(qk.dtype, torch.float32)
            key, inverse = unit(qk.reshape(-1, qk.shape[-1]).to(wide))
            inverse = inverse.squeeze(-1)
            scale = 1 / (inverse * math.sqrt(qk.shape[-1]))
            rows = value.reshape(-1, value.shape[-1])
            y, normaliser, alone = _attend(_Tiles(window, Rounds(order, bucket, code), key, scale, rows))
            y = y.to(value.dtype).view_as(value)
        ctx.save_for_backward(key, inverse, scale, value, y, normaliser, alone, order, bucket, code)
        ctx.window, ctx.dtypes = window, (qk.dtype, value.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of qk and values."""
        key, inverse, scale, value, y, normaliser, alone, order, bucket, code = ctx.saved_tensors
        with torch.autocast(key.device.type, enabled=False):
            rows = value.reshape(-1, value.shape[-1])
            tiles = _Tiles(ctx.window, Rounds(order, bucket, code), key, scale, rows)
            grad_y = grad.reshape(rows.shape).to(key.dtype)
            mean = torch.linalg.vecdot(grad_y, y.reshape(rows.shape).to(key.dtype))
            grad_key, radial, grad_value = _attend_backward(tiles, grad_y, mean, normaliser)
            grad_value.addcmul_(grad_y, alone[:, None].to(key.dtype))
            # Both roles meet in grad_key, as gradients of the unit vector, but for the part of the
            # query's along itself, which is in `radial`.
            along = radial / math.sqrt(key.shape[-1]) - torch.linalg.vecdot(key, grad_key) * inverse
            grad_qk = grad_key.mul_(inverse[:, None]).addcmul_(key, along[:, None])
        qk_dtype, value_dtype = ctx.dtypes
        shape = value.shape
        return (
            grad_qk.view(shape).to(qk_dtype),
            grad_value.view(shape).to(value_dtype),
            None,
            None,
            None,
            None,
        )


def _attend(tiles: _Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (rows, D), the logsumexp of each row's scores, and which rows had nothing to read."""
    rows, head_dim = tiles.unit.shape
    # One row more, for what padding writes.
    y = tiles.unit.new_empty(rows + 1, head_dim)
    top = tiles.unit.new_full((rows + 1,), FLOOR)
    total = tiles.unit.new_zeros(rows + 1)
    for places in tiles.places():
        _add_piece(tiles, places, y, top, total)
    y, top, total = y[:rows], top[:rows], total[:rows]
    alone = top == FLOOR
    y.mul_(total.reciprocal().masked_fill_(alone, 0)[:, None])
    y.addcmul_(tiles.value.to(y.dtype), alone[:, None].to(y.dtype))
    return y, torch.where(alone, 0, top + total.log()), alone


@repeatable
def _add_piece(tiles: _Tiles, places: _Places, y: Tensor, top: Tensor, total: Tensor) -> None:
    """Bring the running outputs, maxima and normalisers of a piece's rows up to date."""
    piece = _Piece(tiles, places)
    scores = tiles.scores(piece)
    row = piece.queries(piece.order).flatten()
    before = top.index_select(0, row)
    now = torch.maximum(before, scores.amax(dim=-1).flatten())
    weights = scores.sub_(now.view(piece.count, -1, 1)).clamp_min_(SMALLEST).exp_()
    once = tiles.once(piece)
    if once is not None:
        weights.mul_(once)
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
    """Gradients of the unit vectors (rows, D) in both roles, of the queries' lengths (rows,), of values.

    `mean` (rows,) is the sum of each row's weights times their gradients.
    """
    rows, head_dim = tiles.unit.shape
    grad_key, grad_value = (tiles.unit.new_zeros(rows + 1, head_dim) for _ in range(2))
    radial = tiles.unit.new_zeros(rows + 1)
    for places in tiles.places():
        _add_piece_backward(tiles, places, grad_y, mean, normaliser, grad_key, radial, grad_value)
    return grad_key[:rows], radial[:rows], grad_value[:rows]


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
    row, count = piece.queries(piece.rows).flatten(), piece.count
    weights = tiles.scores(piece).sub_(normaliser.index_select(0, row).view(count, -1, 1))
    weights.clamp_min_(SMALLEST).exp_()
    once = tiles.once(piece)
    if once is not None:
        weights.mul_(once)
    grad = grad_y.index_select(0, row).view(count, -1, grad_y.shape[-1])
    piece_value = torch.zeros_like(piece.value)
    piece.add_products(piece_value, weights, grad)
    grad_value.index_add_(0, piece.order, piece_value)
    values = piece.blocks(piece.value).transpose(1, 2)
    grad_scores = torch.bmm(grad, values, out=tiles.work(count))
    grad_scores.sub_(mean.index_select(0, row).view(count, -1, 1)).mul_(weights)
    piece_key = piece_value.zero_()
    piece.add_products(piece_key, grad_scores, piece.query)
    grad_query = torch.bmm(grad_scores, piece.blocks(piece.key))
    along = torch.linalg.vecdot(grad_query, piece.queries(piece.key))
    radial.index_add_(0, piece.queries(piece.order).flatten(), along.flatten())
    piece.queries(piece_key).addcmul_(grad_query, piece.scale)
    grad_key.index_add_(0, piece.order, piece_key)
