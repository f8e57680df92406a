"""The result of a visit of a block, and sums of auxiliary losses."""

from __future__ import annotations

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
