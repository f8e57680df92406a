"""The result of a visit of a block, and sums of auxiliary losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class VisitResult(NamedTuple):
    """Outputs of a visit that are kept after the forward pass: state and auxiliary loss. The hidden states
    are not kept: with them the memory of the forward pass would grow with depth under every strategy."""

    state: Any
    aux_loss: Tensor | None


def summed(*losses: Tensor | None) -> Tensor | None:
    """Return the sum of the losses that are not None; None if all are."""
    present = [loss for loss in losses if loss is not None]
    return sum(present[1:], present[0]) if present else None


def weighted(losses: Sequence[Tensor | None], pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the losses of pieces (B, n, C) of a sequence, each times its share of the tokens: their sum is a
    mean, as large as the loss of the whole sequence."""
    tokens = sum(piece.shape[1] for piece in pieces)
    return [
        None if loss is None else loss * (piece.shape[1] / tokens)
        for loss, piece in zip(losses, pieces, strict=True)
    ]
