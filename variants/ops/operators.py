"""Operators that are Python functions of this project. Counters look inside them.

torch.compile takes such an operator whole. What its function dispatches is hidden from the modes around the
operator, on fake tensors too, because a fake gives only the shapes of results. A counter that wants the work
therefore calls the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

NAMESPACE = "longctx_bench"
_implementations: dict[Any, Callable[..., Any]] = {}


def operator(name: str, function: Callable[..., Any], *, schema: str) -> CustomOpDef:
    """Register a function as an operator. It must follow from shapes alone which operations it dispatches, so
    that it can run on fake tensors."""
    made = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=(), schema=schema)
    _implementations[getattr(torch.ops.longctx_bench, name).default] = function
    return made


def implementation(func: Any) -> Callable[..., Any] | None:
    """Return the function of an operator that `operator` registered, or None for another operation."""
    return _implementations.get(func)
