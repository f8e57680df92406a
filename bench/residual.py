"""What happens to activations between forward and backward.

A strategy runs the blocks of a network in order; `STRATEGIES` maps the name of `activations=` to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute


class BlockOut(NamedTuple):
    """What a block returns: hidden states (B, T, C), the attention layer's new state and auxiliary loss."""

    x: Tensor
    state: Any
    aux_loss: Tensor | None


Block = Callable[..., BlockOut]
"""(x, state, causal=…) → BlockOut."""
Strategy = Callable[..., tuple[Tensor, list[BlockOut]]]
"""(blocks, x, states, causal=…) → hidden states and what each block returned."""


def _in_order(
    run: Callable[[Block, Tensor, Any], BlockOut], blocks: Sequence[Block], x: Tensor, states: Sequence[Any]
) -> tuple[Tensor, list[BlockOut]]:
    outs = []
    for block, state in zip(blocks, states, strict=True):
        out = run(block, x, state)
        x = out.x
        outs.append(out)
    return x, outs


def keep(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[BlockOut]]:
    """Every activation is stored, as autograd does by itself."""
    return _in_order(lambda block, x, state: block(x, state, causal=causal), blocks, x, states)


def checkpoint(
    blocks: Sequence[Block], x: Tensor, states: Sequence[Any], *, causal: bool
) -> tuple[Tensor, list[BlockOut]]:
    """Only each block's input is stored; the rest is computed again in the backward pass.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, with one
    block a segment. The random state is put back for the second computation.
    """

    def run(block: Block, x: Tensor, state: Any) -> BlockOut:
        return BlockOut(*recompute(block, x, state, causal=causal, use_reentrant=False))

    return _in_order(run, blocks, x, states)


STRATEGIES: dict[str, Strategy] = {"keep": keep, "checkpoint": checkpoint}
