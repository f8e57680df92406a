"""FLOPs that were dispatched: 2 per multiply-accumulate, recompute and padding included.

torch's own counter with the attention kernels put right: it knows no formula for the CPU kernel,
so dense attention would count 0 there, and it counts a causal call as the full T × T although the
kernels skip what `is_causal` forbids. A mask given as a tensor is counted in full, because nothing
is skipped there. Softmax, norms, sorting, gathers and other elementwise work count 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_KERNELS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
FORWARD_PRODUCTS = 2
"""Products of size queries × keys × head_dim: the scores and the weighted sum."""
BACKWARD_PRODUCTS = 5
"""The fused kernels' backward: the scores again, and the gradients of V, the weights, Q and K."""


def _pairs(queries: int, keys: int, is_causal: bool) -> int:
    """(query, key) pairs computed; a causal kernel aligns the first query with the first key."""
    if not is_causal:
        return queries * keys
    square = min(queries, keys)
    return square * (square + 1) // 2 + max(0, queries - keys) * keys


def _formula(packet: Any, products: int) -> Callable[..., int]:
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        batch, heads, queries, head_dim = given["query"].shape
        pairs = _pairs(queries, given["key"].shape[2], bool(given.get("is_causal", False)))
        return int(2 * products * batch * heads * pairs * head_dim)

    count._get_raw = True  # type: ignore[attr-defined]  # we read flags, not only shapes
    return count


def attention_formulas() -> dict[Any, Callable[..., int]]:
    """A formula for every fused attention kernel that this torch has, forward and backward."""
    formulas = {}
    for kernel in _KERNELS:
        for name, products in ((kernel, FORWARD_PRODUCTS), (f"{kernel}_backward", BACKWARD_PRODUCTS)):
            packet = getattr(torch.ops.aten, name)
            formulas[packet] = _formula(packet, products)
    return formulas


class CountFlops(TorchDispatchMode):
    """Context manager; `.total` holds the FLOPs dispatched inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = FlopCounterMode(display=False, custom_mapping=attention_formulas()).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out
