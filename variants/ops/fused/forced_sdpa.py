"""torch's scaled_dot_product_attention by one of its backends, or not at all.

Without a choice torch takes the first backend that accepts the tensors, and *math*, which stores T × T
scores, if none does. Here the choice is part of a variant's configuration, and a backend that does not accept
the tensors is a reason in the record.

Untried: flash, cudnn and efficient have not been forced on a CUDA device yet. flash has a CPU kernel, with
which it is tested.

Shapes: B batch, H heads, T tokens, D channels of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from variants.base import Impl

if TYPE_CHECKING:
    from torch.nn.attention import SDPBackend

BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""Name of an implementation → member of `torch.nn.attention.SDPBackend`."""
EXAMPLE_TOKENS = 128


def forced(name: str, *, flop_overhead_reason: str | None = None) -> Impl:
    """Return the implementation by a backend: q, k and v (B, H, T, D) → (B, H, T, D).

    In a plan, whose fake tensors lie on the CPU, its fused kernel stands for the others: it stores as much.
    """

    def run(layer: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        from torch.nn.attention import sdpa_kernel

        planned = name != "math" and q.device.type != layer.device_type
        with nullcontext() if planned else sdpa_kernel([_backend(name)]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return Impl(
        run=run,
        missing=_missing(name),
        flop_overhead_reason=flop_overhead_reason,
        has_shape_functions=True,
        untried=name != "math",
    )


def _backend(name: str) -> SDPBackend:
    from torch.nn.attention import SDPBackend

    backend: SDPBackend = getattr(SDPBackend, BACKENDS[name])
    return backend


def _missing(name: str) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """The function that returns why a backend does not train heads of this size in this dtype, or None."""

    @cache
    def missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        from torch.nn.attention import sdpa_kernel

        with warnings.catch_warnings(record=True) as told, torch.enable_grad():
            warnings.simplefilter("always")  # torch warns of the reason, and then raises an error without it
            try:
                q = torch.zeros(
                    1, 1, EXAMPLE_TOKENS, head_dim, device=device, dtype=dtype, requires_grad=True
                )
                with sdpa_kernel([_backend(name)]):
                    y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
                y.sum().backward()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as refusal:
                lines = [str(one.message) for one in told] or [str(refusal)]
                reason = "; ".join(dict.fromkeys(" ".join(line.split()) for line in lines))
            else:
                return None
        kind = str(dtype).removeprefix("torch.")
        return f"impl={name} does not run heads of {head_dim} channels in {kind} on {device.type}: {reason}"

    return missing
