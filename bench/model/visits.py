"""What is kept of a visit of a block.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class VisitResult(NamedTuple):
    """Outputs of a visit kept after the next one has run: state and auxiliary loss. Keeping every `x` would
    make the forward pass grow with depth, whatever is stored for the backward pass."""

    state: Any
    aux_loss: Tensor | None


def summed(*losses: Tensor | None) -> Tensor | None:
    """The sum of the losses that there are; None where there is none."""
    known = [loss for loss in losses if loss is not None]
    return sum(known[1:], known[0]) if known else None
