"""Pieces of a round of hashed attention: gathered rows, scores and weights, in reused memory.

Shapes: D channels of a head, R rounds. A piece consists of n blocks of b queries in sorted order and the L
keys at the same positions, of which each block reads K (see `variants.ops.lsh.windows`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from variants.ops.lsh.windows import FORBIDDEN, Rounds, Window

MIN_EXPONENT = -60.0
"""Smaller exponents are raised to this before the exponential. e⁻⁶⁰ is far below the rounding error of the 1
that each sum contains, and far enough above the smallest normal number that its products with gradients are
normal too. With subnormal numbers a training step took six times as long, and the vector exp 35 times."""
ZERO_WEIGHT = 1.001 * math.exp(MIN_EXPONENT)
"""Weights up to this are set to 0."""


@dataclass
class Workspace:
    """Reused memory of a pass, and the computations on a piece that both passes share."""

    window: Window
    rounds: Rounds
    unit: Tensor
    """(rows + 1, D): the keys, of unit length. Here and below, the last row is 0 and is read by padding."""
    scale: Tensor
    """(rows + 1,): a query is its key multiplied by this. Includes the factor 1/√D."""
    value: Tensor
    """(rows + 1, D): the values."""

    def __post_init__(self) -> None:
        window = self.window
        self.forbidden = window.forbidden(self.unit)
        self.sequences = (self.unit.shape[0] - 1) // window.seq_len
        self.piece_ranges = list(window.pieces(self.sequences))
        most = max(count for _, count in self.piece_ranges)
        shape = (most, window.block, window.keys)
        self._scores, self._scratch = self.unit.new_empty(shape), self.unit.new_empty(shape)
        code = self.rounds.code
        self._codes = [code.new_empty(shape) for _ in range(min(2, len(code) - 1))]

    def pieces(self) -> Iterator[PieceIndices]:
        """The pieces of all rounds, in order."""
        window = self.window
        for r in range(len(self.rounds.order)):
            for first, count in self.piece_ranges:
                here = slice(first, first + (count - 1) * window.block + window.keys)
                yield PieceIndices(r, count, self.rounds.order[r, here], self.rounds.bucket[r, here])

    def scratch(self, count: int) -> Tensor:
        """Uninitialised memory (count, b, K); `scores` and `weights` overwrite it."""
        return self._scratch[:count]

    def scores(self, piece: Piece) -> Tensor:
        """(n, b, K) scores of a piece; at most about −FORBIDDEN where the round does not read the pair."""
        scores = self._scores[: piece.count]
        queries, keys = piece.queries(piece.bucket), piece.blocks(piece.bucket)
        if self.window.band:  # all queries of a block are of one bucket
            queries = queries[:, :1]
        distance = self._scratch.flatten()[: queries.numel() * keys.shape[1]].view(*queries.shape, -1)
        torch.sub(queries[:, :, None], keys[:, None, :], out=distance).abs_()
        torch.sub(self.forbidden, distance, alpha=FORBIDDEN, out=scores)
        # `out=`, because torch's FLOP counter has no formula for the in-place form
        return torch.baddbmm(scores, piece.query, piece.blocks(piece.key).transpose(1, 2), out=scores)

    def weights(self, piece: Piece, scores: Tensor, top: Tensor) -> Tensor:
        """exp(scores − top (n·b,)), in place; exactly 0 where the round must not count the pair."""
        weights = scores.sub_(top.view(piece.count, -1, 1)).clamp_min_(MIN_EXPONENT).exp_()
        torch.threshold_(weights, ZERO_WEIGHT, 0.0)
        first_read = self.first_read(piece)
        return weights if first_read is None else weights.mul_(first_read)

    def first_read(self, piece: Piece) -> Tensor | None:
        """(n, b, K): 0 where an earlier round already reads the pair, else 1; None in the first round."""
        if piece.round == 0:
            return None
        shift, most = self.window.same
        nearest, difference = self._codes[0][: piece.count], self._codes[-1][: piece.count]
        for earlier in range(piece.round):
            code = self.rounds.code[earlier, piece.order]
            queries, keys = piece.queries(code) - shift, piece.blocks(code)
            out = difference if earlier else nearest
            torch.sub(queries[:, :, None], keys[:, None, :], out=out)
            out.abs_()
            if earlier:
                torch.minimum(nearest, out, out=nearest)
        return nearest.gt_(most)


class PieceIndices(NamedTuple):
    """Position of a piece: its round, its number of blocks, and its part of the sorted order."""

    round: int
    blocks: int
    order: Tensor
    """(L,): rows; at padding, the number of rows."""
    bucket: Tensor
    """(L,): their buckets, as in `Rounds.bucket`."""


class Piece:
    """n blocks of queries in the sorted order of a round, with the keys that they read."""

    def __init__(self, workspace: Workspace, indices: PieceIndices) -> None:
        self.window, self.round, self.count = workspace.window, indices.round, indices.blocks
        self.order = indices.order
        self.bucket = indices.bucket.to(workspace.unit.dtype)
        self.key = workspace.unit.index_select(0, self.order)
        self.value = workspace.value.index_select(0, self.order).to(workspace.unit.dtype)
        self.scale = self.queries(workspace.scale.index_select(0, self.order))[:, :, None]
        self.query = self.queries(self.key) * self.scale

    def queries(self, x: Tensor) -> Tensor:
        """The entries of the queries, by block: (L, …) → (n, b, …), a view."""
        back, block = self.window.back, self.window.block
        return x[back : back + self.count * block].view(self.count, block, *x.shape[1:])

    def blocks(self, x: Tensor) -> Tensor:
        """The entries of the keys of each block: (L, …) → (n, K, …), an overlapping view."""
        return x.unfold(0, self.window.keys, self.window.block).movedim(-1, 1)

    def add_products(self, into: Tensor, weights: Tensor, x: Tensor) -> None:
        """Add to each key in `into` (L, D) its sum over queries of weights (n, b, K) · x (n, b, D).

        Each step handles blocks at such a distance that their keys do not overlap.
        """
        block, keys = self.window.block, self.window.keys
        step = -(-keys // block)
        for first in range(min(step, self.count)):
            weights_here = weights[first::step]
            target = into[first * block :].unfold(0, keys, step * block)[: len(weights_here)].movedim(-1, 1)
            torch.baddbmm(target, weights_here.transpose(1, 2), x[first::step], out=target)
