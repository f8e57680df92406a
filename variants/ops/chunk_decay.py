"""Products of decays within chunks, and sums over channels that they weight, for `variants.ops.delta_rule`.

Shapes: G chunks of c tokens, D channels of queries and keys.

b_t is the sum of the logarithms of the decays of a chunk up to token t. A pair of a row i and a column j ≤ i
has the weight exp(b_i − b_j): the decays of all tokens after the column, up to the row. The difference is
taken in float64 before the exponential, so no factor exceeds 1, and no decay is too strong.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from variants.ops.scan_chunks import LEAST_LOG


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
    def pairs_backward(self, grad: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of rows and columns, from that of `pairs`, which is 0 for later columns."""


class NoDecay(ChunkDecay):
    """All decays are 1."""

    def pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of earlier columns."""
        return torch.bmm(rows, columns.mT).tril_()

    def pairs_backward(self, grad: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Two products."""
        return torch.bmm(grad, columns), torch.bmm(grad.mT, rows)


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

    def pairs_backward(self, grad: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Two products."""
        decayed = grad * self.within
        return torch.bmm(decayed, columns), torch.bmm(decayed.mT, rows)


def decay_of(log_decay: Tensor | None) -> ChunkDecay:
    """The decays with logarithms (G, c, 1); None: no decay."""
    return NoDecay() if log_decay is None else HeadDecay(log_decay)
