"""The discrete choices of a layer in the reference gate: buckets, clusters, units above 0.

Two dtypes can only be compared where both make the same choices, so the reference makes those of the fast
path. In float32 nearly all of them must be its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.measure.gate_failed import GateFailed
from variants.base import Context, MakesChoices

MOVED = 1e-3
"""Maximum share of discrete choices that rounding to float32 may change. A number of unit variance is within
float32's error of a limit with a probability of about 1e-6, but a gate sees some hundred thousand of them."""
FEWEST_MOVED = 2
"""So many choices may change in any case: two neighbours in an order, or a token of two clusters."""


def choices_in(
    dtype: torch.dtype, fast: MakesChoices, own: Callable[[Tensor, Context], Any]
) -> Callable[[Tensor, Context], Any]:
    """A replacement for the method `choices` of a reference, which is `own`: the choices of the fast path in
    this dtype. In float32 it raises GateFailed if they are others than rounding explains."""

    def choices(x: Tensor, ctx: Context) -> Any:
        with torch.no_grad(), torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            made = fast.choices(x.float(), ctx)
        if dtype == torch.float32:
            with torch.no_grad():
                _require_alike(tree_leaves(made), tree_leaves(own(x, ctx)))
        return made

    return choices


def _require_alike(made: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    for here, there in zip(made, wanted, strict=True):
        if here is None or there is None:
            continue
        moved = int((here != there).sum())
        if moved > max(FEWEST_MOVED, MOVED * here.numel()):
            raise GateFailed(
                f"reference gate: {moved} of {here.numel()} choices differ from those of float64, "
                f"allowed are {max(FEWEST_MOVED, int(MOVED * here.numel()))}"
            )
