"""Strategies that store or recompute activations between the forward and the backward pass.

A strategy runs the visits of blocks in order; `STRATEGIES` maps the values of `activations=` to strategies.

Shapes: B batch, T tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from bench.model.visits import Run, VisitResult
from variants.base import Context, Visit
from variants.ops import experts as experts  # registers operators


def _in_order(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    results = []
    for visit, state in zip(visits, states, strict=True):
        x, *result = visit(x, state, ctx)
        results.append(VisitResult(*result))
    return x, results


def keep(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Store all activations, as autograd does by default."""
    return _in_order(visits, x, states, ctx)


def _recomputed(
    size: int,
    visits: Sequence[Visit],
    x: Tensor,
    states: Sequence[Any],
    ctx: Context,
    **options: Any,
) -> tuple[Tensor, list[VisitResult]]:
    """Store only the input of each group of `size` blocks; the backward pass recomputes the group from it."""
    results: list[VisitResult] = []
    for begin in range(0, len(visits), size):
        group, group_states = visits[begin : begin + size], states[begin : begin + size]
        x, group_results = recompute(
            _without_autocast_cache, group, x, group_states, ctx, use_reentrant=False, **options
        )
        results += group_results
    return x, results


def _without_autocast_cache(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Run the visits in order with an empty autocast cache, as in a recomputation.

    Autocast casts a weight once and reuses the copy. Without this function, a weight that an earlier window
    or layer used would not be cast again in the forward pass, but in the recomputation, which must dispatch
    the same operations. The copies of one group are also freed when the next group begins.
    """
    torch.clear_autocast_cache()
    return _in_order(visits, x, states, ctx)


def checkpoint(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Store only the input of each block; the backward pass recomputes the other activations.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, with one
    block per segment. The recomputation restores the random state.
    """
    return _recomputed(1, visits, x, states, ctx)


def sqrt(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Store only the input of every ⌈√L⌉-th of L blocks (Chen et al. 2016, §4.1).

    The backward pass holds the activations of one such group at a time, so both terms grow as √L.
    """
    return _recomputed(math.isqrt(max(0, len(visits) - 1)) + 1, visits, x, states, ctx)


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


_OPERATORS = {torch.ops.longctx_bench.expert_linear.default}
"""Products that are operators of this project with a registered derivative, which disables gradients."""


def _keeps_products(_context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # Inside an autograd.Function gradients are disabled: results are overwritten in place, and the function
    # itself chooses what to store.
    stored = op in _OPERATORS or (op in _PRODUCTS and torch.is_grad_enabled())
    return CheckpointPolicy.MUST_SAVE if stored else CheckpointPolicy.PREFER_RECOMPUTE


def selective(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Store the results of matrix products and attention kernels; the backward pass recomputes cheap
    operations, such as norms and activation functions (torch's selective checkpointing).

    A variant with its own autograd.Function runs it twice, because torch sees no kernel in it.
    """
    contexts = partial(create_selective_checkpoint_contexts, _keeps_products)
    return _recomputed(1, visits, x, states, ctx, context_fn=contexts)


def offload(
    visits: Sequence[Visit], x: Tensor, states: Sequence[Any], ctx: Context
) -> tuple[Tensor, list[VisitResult]]:
    """Store all activations, in the host's pinned memory instead of the device's memory."""
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return _in_order(visits, x, states, ctx)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to reduce activation memory."""

    run: Run
    stored: Run = keep
    """The same network with all activations stored."""
    visits_separately: bool = False
    """It treats each visit by itself, as if the others did not exist."""
    untraceable: str | None = None
    """Why the strategy itself cannot be compiled, only the blocks that it runs; None if it can."""
    needs_device: bool = False
    """It moves activations from the device to the host, so it needs an accelerator."""
    depth_exponent: float | None = None
    """Claimed growth of the memory that is stored on the device for the backward pass, as an exponent of the
    depth n. 1: the activations or the inputs of all n layers are stored. 0.5: every √n-th input is stored
    (Chen 2016, arXiv:1604.06174, abstract). 0: inputs are rebuilt (Gomez 2017, arXiv:1707.04585, abstract).
    None: no source states it."""

    def unsupported(self, device: str, compile: str = "off") -> str | None:
        """Return why the strategy cannot be used on this type of device or with a value of `compile`; None if
        it can."""
        if self.needs_device and device == "cpu":
            return "moves activations from the device to the host, but on cpu they are already there"
        if self.untraceable and compile == "model":
            return f"with compile=model: {self.untraceable}; allowed are compile=off and block"
        return None


STRATEGIES: dict[str, Strategy] = {
    "keep": Strategy(run=keep, depth_exponent=1, visits_separately=True),
    "checkpoint": Strategy(run=checkpoint, depth_exponent=1, visits_separately=True),
    "sqrt": Strategy(run=sqrt, depth_exponent=0.5),
    "selective": Strategy(run=selective, depth_exponent=1, visits_separately=True),
    "reversible": Strategy(
        run=reversible,
        stored=two_streams,
        untraceable="its backward pass runs the blocks again, which the compiler cannot trace",
        depth_exponent=0,
    ),
    "offload": Strategy(
        run=offload,
        untraceable="it moves activations through hooks, which the compiler cannot trace",
        needs_device=True,
    ),
}
