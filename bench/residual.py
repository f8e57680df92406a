"""What happens to activations between forward and backward.

A strategy runs the blocks of a network in order: (blocks, x, causal) → (x, auxiliary losses).
`STRATEGIES` maps the name of `activations=` to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

BlockFn = Callable[..., tuple[Tensor, Tensor | None]]
"""A block of the network: (x, causal=…) → (x, auxiliary loss or None)."""


def keep(blocks: Sequence[BlockFn], x: Tensor, *, causal: bool) -> tuple[Tensor, list[Tensor]]:
    """Every activation is stored, as autograd does by itself."""
    losses = []
    for block in blocks:
        x, loss = block(x, causal=causal)
        if loss is not None:
            losses.append(loss)
    return x, losses


def checkpoint(blocks: Sequence[BlockFn], x: Tensor, *, causal: bool) -> tuple[Tensor, list[Tensor]]:
    """Only each block's input is stored; the rest is computed again in the backward pass.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, with one
    block a segment. The random state is put back for the second computation.
    """
    losses = []
    for block in blocks:
        x, loss = recompute(block, x, causal=causal, use_reentrant=False)
        if loss is not None:
            losses.append(loss)
    return x, losses


Strategy = Callable[..., tuple[Tensor, list[Tensor]]]
STRATEGIES: dict[str, Strategy] = {"keep": keep, "checkpoint": checkpoint}
