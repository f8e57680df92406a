"""What happens to activations between forward and backward.

A strategy runs the visits of blocks in order; `STRATEGIES` maps the name of `activations=` to it.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)
from torch.utils.checkpoint import checkpoint as recompute

from bench.model.reversible import reversible, two_streams
from bench.model.visits import VisitResult
from variants.base import Context, Visit

Run = Callable[..., tuple[Tensor, list[VisitResult]]]
"""(visits, x, states, ctx) → hidden states and what is kept of each visit."""


def _in_order(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    outs = []
    for visit, state in zip(visits, states, strict=True):
        x, *kept = visit(x, state, ctx)
        outs.append(VisitResult(*kept))
    return x, outs


def keep(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Every activation is stored, as autograd does by itself."""
    return _in_order(visits, x, states, ctx)


def _recomputed(
    size: int,
    visits: Sequence[Visit],
    x: Tensor,
    states: Sequence[Any],
    ctx: Context,
    **options: Any,
) -> tuple[Tensor, list[VisitResult]]:
    """Groups of `size` blocks, each computed again from its input in the backward pass."""
    outs: list[VisitResult] = []
    for begin in range(0, len(visits), size):
        group, entering = visits[begin : begin + size], states[begin : begin + size]
        x, found = recompute(_from_cold, group, x, entering, ctx, use_reentrant=False, **options)
        outs += found
    return x, outs


def _from_cold(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """`_in_order` with an empty autocast cache, as a recomputation starts with.

    Autocast casts a weight once and reuses the copy. Without this, a weight that an earlier window or layer
    used would not be cast again in the forward pass, but would be in the recomputation, which must dispatch
    the same operations. The copies of one group are also freed when the next one begins.
    """
    torch.clear_autocast_cache()
    return _in_order(visits, x, states, ctx)


def checkpoint(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Only each block's input is stored; the rest is computed again in the backward pass.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, with one
    block a segment. The random state is put back for the second computation.
    """
    return _recomputed(1, visits, x, states, ctx)


def sqrt(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Only the input of every ⌈√L⌉-th of L blocks is stored (Chen et al. 2016, §4.1).

    Backward stores the activations of one such group at a time, so both grow as √L.
    """
    return _recomputed(max(1, math.isqrt(len(visits) - 1) + 1), visits, x, states, ctx)


_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
}


def _keeps_products(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # Inside an autograd.Function, where gradients are off, results are overwritten in place and what is
    # worth storing is the function's own choice.
    kept = op in _PRODUCTS and torch.is_grad_enabled()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Of each block, the results of matrix products and attention kernels are stored; norms, activation
    functions and what else is cheap are computed again (torch's selective checkpointing).

    Variants with an autograd.Function of their own run it twice, because torch sees no kernel in it.
    """
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    return _recomputed(1, visits, x, states, ctx, context_fn=contexts)


def offload(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Every activation is stored, in the host's pinned memory instead of the device's."""
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return _in_order(visits, x, states, ctx)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way of saving activation memory."""

    run: Run
    stored: Run = keep
    """The same network with every activation stored."""
    needs_device: bool = False
    """It moves activations away from the device, so there has to be one."""
    depth_exponent: float | None = None
    """The exponent of depth with which what is saved for the backward pass is said to grow on the device:
    n of n layers, be it all or their inputs; √n where every √n-th is stored (Chen 2016, arXiv:1604.06174,
    abstract); nothing that depends on n where inputs are rebuilt (Gomez 2017, arXiv:1707.04585, abstract).
    None where nobody says."""

    def unsupported(self, device: str) -> str | None:
        """Why it cannot be used on this type of device, or None."""
        if self.needs_device and device == "cpu":
            return "moves activations from the device to the host, and on cpu they are there already"
        return None


STRATEGIES: dict[str, Strategy] = {
    "keep": Strategy(run=keep, depth_exponent=1),
    "checkpoint": Strategy(run=checkpoint, depth_exponent=1),
    "sqrt": Strategy(run=sqrt, depth_exponent=0.5),
    "selective": Strategy(run=selective, depth_exponent=1),
    "reversible": Strategy(run=reversible, stored=two_streams, depth_exponent=0),
    "offload": Strategy(run=offload, needs_device=True),
}
