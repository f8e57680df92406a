"""Sorted rows of several sequences in all rounds, one after the other, for the kernels of merged rounds.

Shapes: R rounds, n sequences, P positions of a sequence in a sorted order, D head_dim, L = n·R·P + 2·margin
rows of a stream: the sorted orders of all sequences and rounds, with padding at both ends.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from variants.ops.lsh.windows import Window

FILL = -1e30
"""Score of a forbidden pair: finite, so that a row without an allowed pair has finite weights."""


class Stream(NamedTuple):
    """The rows of a piece in sorted order."""

    window: Window
    shape: tuple[int, int, int]
    """n, R, P."""
    margin: int
    """Padding at each end, so that the keys of every block of queries are rows of the stream."""
    row: Tensor
    """(L,) int32: the row of the layer at each position; the number of rows at padding."""
    rows: Tensor
    """(L, 2, D): query-keys and values; 0 at padding."""
    factor: Tensor
    """(L,): a key is its query-key multiplied by this."""
    code: Tensor
    """(R, L): the codes of the rows in each round (see `variants.ops.lsh.layout.Layout`)."""
    own: Tensor
    """(L,): the codes of the rows in their own round, far from those of the orders before and after."""

    def inner(self, x: Tensor) -> Tensor:
        """Without the padding at both ends: (L, …) → (n·R·P, …), a view."""
        return x[self.margin : len(x) - self.margin]


class Kernel(Protocol):
    """Softmax attention within each round of a stream; a pair counts in the first round that reads it.

    The score of a query and a key is the product of their rows, times the factor of the key.
    """

    multiple: int
    """P is a multiple of this."""

    def sequences(self, rounds: int, positions: int, window: Window, head_dim: int, *, backward: bool) -> int:
        """The number of sequences that a pass computes at a time."""

    def new_decisions(
        self, sequences: int, rounds: int, positions: int, window: Window, like: Tensor
    ) -> Tensor:
        """(N, …): memory for what the forward pass decides and the backward pass needs again."""

    def forward(self, stream: Stream, decisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the keys of exp(score − top)·value (n·R·P, D); top, and the logsumexp of the scores of
        each row in its round (n·R·P,), float32 or float64. The kernel chooses top.

        If a row reads nothing, top and logsumexp are at most about `FILL`, and the sums are finite. Writes
        the decisions (n, …).
        """

    def backward(
        self, stream: Stream, decisions: Tensor, lse: Tensor, grad: Tensor, mean: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query-keys as queries, of query-keys as keys, and of values: (n·R·P, D) each.

        decisions are those of the forward pass. The weight of a pair is exp(score − lse) with lse (L,), the
        logsumexp of the scores of all rounds. The gradient of a score is weight·(grad·value − mean), with
        grad (L, D) and mean (L,).
        """
