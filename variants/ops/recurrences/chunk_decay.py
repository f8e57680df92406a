"""Products of decays within chunks, and sums over channels that they weight, for `delta_rule`.

Shapes: G chunks of c tokens, D channels of queries and keys.

b_t is the sum of the logarithms of the decays of a chunk up to token t. A pair of a row i and a column j ≤ i
has the weight exp(b_i − b_j): the decays of all tokens after the column, up to the row. The difference is
taken in float64 before the exponential, so no factor exceeds 1, and no decay is too strong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.ops.recurrences.scan_chunks import LEAST_LOG

BLOCK = 4
"""Tokens of a block whose pairs have decays of channels of their own, at most, if halving leads there."""


class Pairs(NamedTuple):
    """Numbers of all pairs of a chunk, (G, c, c)."""

    scores: Tensor
    """`pairs` of queries and keys, or what belongs to them."""
    overlaps: Tensor
    """`pairs` of keys and keys, without a token's own."""


def later_sums(x: Tensor) -> Tensor:
    """Sums over each token and all later ones of its chunk: (G, c, D) → (G, c, D)."""
    return x.flip(1).cumsum(1).flip(1)


def earlier_sums(x: Tensor) -> Tensor:
    """Sums over all tokens before each token of its chunk: (G, c, D) → (G, c, D)."""
    return F.pad(x[:, :-1].cumsum(1), (0, 0, 1, 0))


class ChunkDecay(ABC):
    """The decays of all chunks of a segment."""

    before: Tensor | None = None
    """(G, c, 1 or D): from the beginning of the chunk to the token, its own included; None: 1."""
    after: Tensor | None = None
    """(G, c, 1 or D): from the token to the end of the chunk."""
    total: Tensor | None = None
    """(G, 1 or D, 1): of all tokens of the chunk."""

    @abstractmethod
    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Σ_d rows_id exp(b_i − b_j) columns_jd for j ≤ i, and 0 for later columns: (G, c, D) → (G, c, c)."""

    @abstractmethod
    def pairs_backward(self, grads: Pairs, weights: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q and k and, with decays, of their logarithms, from those of all pairs.

        The gradients of pairs are 0 for later columns.
        """


class NoDecay(ChunkDecay):
    """All decays are 1."""

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of earlier columns."""
        return torch.bmm(rows, columns.mT).tril_()

    def pairs_backward(self, grads: Pairs, weights: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Three products; overlaps are those of rows and of columns."""
        of_k = torch.bmm(grads.overlaps + grads.overlaps.mT, k)
        return torch.bmm(grads.scores, k), torch.baddbmm(of_k, grads.scores.mT, q)


class HeadDecay(ChunkDecay):
    """One decay for each token of a head."""

    def __init__(self, log_decay: Tensor) -> None:
        """From the logarithms (G, c, 1)."""
        b = log_decay.double().clamp(min=LEAST_LOG).cumsum(1)
        later = torch.ones(b.shape[1], b.shape[1], dtype=torch.bool, device=b.device).triu(1)
        dtype = log_decay.dtype
        self.within = (b - b.mT).to(dtype).masked_fill_(later, float("-inf")).exp_()
        self.before, self.after = b.to(dtype).exp(), (b[:, -1:] - b).to(dtype).exp_()
        self.total = self.before[:, -1:]

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores, times the decays."""
        return torch.bmm(rows, columns.mT).mul_(self.within)

    def pairs_backward(self, grads: Pairs, weights: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Three products, and the sums of all pairs across a token."""
        scores, overlaps = grads.scores * self.within, grads.overlaps * self.within
        of_k = torch.baddbmm(torch.bmm(overlaps + overlaps.mT, k), scores.mT, q)
        of_pairs = (grads.scores * weights.scores).addcmul_(grads.overlaps, weights.overlaps)
        # columns before t, then rows from t on
        across = of_pairs.cumsum(2).tril_(-1).sum(1)[:, :-1]
        return torch.bmm(scores, k), of_k, F.pad(across, (1, 0)).unsqueeze(-1)


class ChannelDecay(ChunkDecay):
    """One decay for each channel of a token, as a diagonal matrix.

    A weight cannot be divided into factors of the row and of the column, each from the beginning of the
    chunk: the column's would exceed any number. So a chunk is halved again and again. Rows of a right half
    decay from the border, and columns of the left half to it, so that both factors are at most 1, and their
    scores are one product. The weights of the last blocks, of a few tokens, are computed pair by pair.
    """

    def __init__(self, log_decay: Tensor) -> None:
        """From the logarithms (G, c, D)."""
        b = log_decay.double().clamp(min=LEAST_LOG).cumsum(1)
        dtype, channels = log_decay.dtype, b.shape[-1]
        self.before, self.after = b.to(dtype).exp(), (b[:, -1:] - b).to(dtype).exp_()
        self.total = self.before[:, -1:].mT
        self.halves: list[tuple[Tensor, Tensor]] = []  # of rows and columns, (blocks, half, D)
        size = b.shape[1]
        while size > BLOCK and size % 2 == 0:
            half = size // 2
            left, right = b.view(-1, 2, half, channels).unbind(1)
            border = left[:, -1:]
            self.halves.append(((right - border).to(dtype).exp_(), (border - left).to(dtype).exp_()))
            size = half
        blocks = b.view(-1, size, channels)
        later = torch.ones(size, size, dtype=torch.bool, device=b.device).triu(1)
        own = (blocks[:, :, None] - blocks[:, None]).to(dtype)
        self.own = own.masked_fill_(later[:, :, None], float("-inf")).exp_()  # (blocks, rows, columns, D)

    @staticmethod
    def _diagonal(x: Tensor, size: int) -> Tensor:
        """The blocks on the diagonal of matrices (G, c, c): a view (G, blocks, size, size)."""
        count = x.shape[1] // size
        return x.view(len(x), count, size, count, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A product for each halving, and sums over channels of the last blocks."""
        result = rows.new_zeros(len(rows), rows.shape[1], rows.shape[1])
        channels = rows.shape[-1]
        for by_row, by_column in self.halves:
            half = by_row.shape[1]
            left = columns.view(-1, 2, half, channels)[:, 0] * by_column
            right = rows.view(-1, 2, half, channels)[:, 1] * by_row
            target = self._diagonal(result, 2 * half)[:, :, half:, :half]
            target.copy_(torch.bmm(right, left.mT).view(target.shape))
        size = self.own.shape[1]
        own = (self.own * columns.view(-1, 1, size, channels)).mul_(rows.view(-1, size, 1, channels))
        target = self._diagonal(result, size)
        target.copy_(own.sum(-1).view(target.shape))
        return result

    def pairs_backward(self, grads: Pairs, weights: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """The same blocks. A decay multiplies the pairs of earlier columns and rows from its token on."""
        of_q, of_k, of_log = self._own_backward(grads, q, k)
        channels = q.shape[-1]

        def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
            left, right = x.view(-1, 2, half, channels).unbind(1)
            return left, right

        for by_row, by_column in self.halves:
            half = by_row.shape[1]
            scores, overlaps = (
                self._diagonal(x, 2 * half)[:, :, half:, :half].reshape(-1, half, half) for x in grads
            )
            left, right = halves(k, half)
            queries = halves(q, half)[1]
            columns = left * by_column
            of_queries = torch.bmm(scores, columns).mul_(by_row)
            of_right = torch.bmm(overlaps, columns).mul_(by_row)
            of_left = torch.bmm(scores.mT, queries * by_row)
            of_left = torch.baddbmm(of_left, overlaps.mT, right * by_row).mul_(by_column)
            halves(of_q, half)[1].add_(of_queries)
            for target, part in zip(halves(of_k, half), (of_left, of_right), strict=True):
                target.add_(part)
            of_rows = of_queries.mul_(queries).addcmul_(of_right, right)
            for target, part in zip(
                halves(of_log, half), (earlier_sums(of_left * left), later_sums(of_rows)), strict=True
            ):
                target.add_(part)
        return of_q, of_k, of_log

    def _own_backward(self, grads: Pairs, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients from the last blocks."""
        size, channels = self.own.shape[1], q.shape[-1]
        rows_q, rows_k = (x.view(-1, size, 1, channels) for x in (q, k))
        columns = k.view(-1, 1, size, channels)
        scores, overlaps = (
            self.own * self._diagonal(x, size).reshape(-1, size, size, 1) for x in grads
        )  # (blocks, rows, columns, D)
        of_q, of_rows = ((x * columns).sum(2).view(q.shape) for x in (scores, overlaps))
        of_pairs = scores.mul_(rows_q).addcmul_(overlaps, rows_k)
        of_k = of_pairs.sum(1).view(k.shape).add_(of_rows)
        of_pairs = of_pairs.mul_(columns).cumsum(2)
        earlier = torch.ones(size, size, dtype=q.dtype, device=q.device).tril_(-1)
        across = (of_pairs * earlier[:, :, None]).sum(1)[:, :-1]
        return of_q, of_k, F.pad(across, (0, 0, 1, 0)).view(q.shape)


def decay_of(log_decay: Tensor | None) -> ChunkDecay:
    """The decays with logarithms (G, c, 1 or D); None: no decay."""
    if log_decay is None:
        return NoDecay()
    return HeadDecay(log_decay) if log_decay.shape[-1] == 1 else ChannelDecay(log_decay)
