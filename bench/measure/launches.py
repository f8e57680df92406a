"""Kernels that operations launch and the bytes that they move, from shapes alone.

An operation is one launch unless it only makes a view, allocates memory, or reads metadata. It moves the
bytes of its tensor arguments and of its results:

- an expanded argument, or one of overlapping windows, counts the elements that differ in storage;
- a result that replaces an argument is written once, and is read if the operation uses its old values;
- a gather reads as much of its source as it returns, and a scatter into an existing tensor changes as much of
  it as it is given;
- a sum of rows that indices name reads these rows.

These are the operations that torch dispatches. An operation on a list of tensors (`_foreach_…`, the fused
optimiser) is one launch here, and one for each few dozen tensors on an accelerator. Caches are not modelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten
_WITHOUT_KERNEL = frozenset(
    {
        aten.empty,
        aten.empty_like,
        aten.empty_permuted,
        aten.empty_strided,
        aten.new_empty,
        aten.new_empty_strided,
        aten._unsafe_view,
        aten.detach_,
        aten.resize_,
        aten.set_,
        aten.unsqueeze_,
        aten.squeeze_,
        aten.transpose_,
        aten.t_,
    }
)
"""Operations that allocate or rearrange, beside those that torch declares to be views."""
_OVERWRITES = frozenset({aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_, aten.random_})
"""Operations in place that do not read the old values. Arguments named `out` are not read either."""
_GATHERS = frozenset({aten.index_select, aten.gather, aten.index, aten.embedding})
"""Operations whose first argument is read where the others say."""
_BAGS = frozenset({aten._embedding_bag, aten._embedding_bag_forward_only})
"""Sums of the rows of their first argument that the second names."""
_SCATTERS = {
    aten.index_add_: "source",
    aten.index_copy_: "source",
    aten.index_put_: "values",
    aten.scatter_: "index",
    aten.scatter_add_: "index",
    aten.scatter_reduce_: "index",
}
"""Operations that change their first argument in some places; the argument with as many elements as these."""


class Counts(NamedTuple):
    """What was dispatched: FLOPs, kernels launched and bytes moved."""

    flops: int = 0
    launches: int = 0
    bytes_moved: int = 0

    def plus(self, other: Counts) -> Counts:
        """Return the sum."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: Counts) -> Counts:
        """Return the difference."""
        return Counts(*(a - b for a, b in zip(self, other, strict=True)))

    def times(self, n: int) -> Counts:
        """Return the counts of n repetitions."""
        return Counts(*(n * count for count in self))


@cache
def is_kernel(func: OpOverload[..., Any]) -> bool:
    """Return whether an operation computes something on its tensors."""
    if func.namespace == "prim" or func.is_view or func.overloadpacket in _WITHOUT_KERNEL:
        return False
    schema = func._schema
    changes = any(argument.alias_info is not None for argument in schema.arguments)
    return changes or any("Tensor" in str(result.type) for result in schema.returns)


@dataclass(frozen=True)
class _Passes:
    """How often each argument of an operation is passed over."""

    by_position: tuple[int, ...]
    by_name: dict[str, int]
    fresh: bool
    """Whether the results are new tensors."""


@cache
def _passes(func: OpOverload[..., Any]) -> _Passes:
    passes: dict[str, int] = {}
    for argument in func._schema.arguments:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if "Tensor" not in str(argument.type):
            passes[argument.name] = 0
        elif changed and not argument.is_out and func.overloadpacket not in _OVERWRITES:
            passes[argument.name] = 2
        else:
            passes[argument.name] = 1
    fresh = any(result.alias_info is None for result in func._schema.returns)
    return _Passes(tuple(passes.values()), passes, fresh)


def bytes_moved(func: OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Return the bytes that an operation with these arguments and result reads and writes."""
    passes = _passes(func)
    total = tensor_bytes(out) if passes.fresh else 0
    for value, times in zip(args, passes.by_position, strict=False):
        if times:
            total += times * tensor_bytes(value)
    for name, value in kwargs.items():
        total += passes.by_name[name] * tensor_bytes(value)
    packet = func.overloadpacket
    if packet in _GATHERS:
        total -= max(0, tensor_bytes(args[0]) - tensor_bytes(out))
    elif packet in _BAGS:
        row = args[0].shape[-1] * args[0].element_size()
        total -= max(0, tensor_bytes(args[0]) - args[1].numel() * row)
    elif packet in _SCATTERS:
        total -= 2 * max(0, tensor_bytes(args[0]) - _scattered_bytes(func, args, kwargs))
    return total


def _scattered_bytes(func: OpOverload[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    places: Tensor = given[_SCATTERS[func.overloadpacket]]
    return places.numel() * int(args[0].element_size())


def tensor_bytes(value: Any) -> int:
    """Return the distinct bytes of a tensor, or of all tensors of a list."""
    if isinstance(value, Tensor):
        if value.is_contiguous():
            return value.numel() * value.element_size()
        return _distinct(value.shape, value.stride()) * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(tensor_bytes, value))
    return 0


@lru_cache(maxsize=4096)
def _distinct(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return how many elements of storage a strided view has.

    From the smallest stride to the largest: copies that do not overlap add up, copies of a run without gaps
    that do overlap extend it. For others the result is an upper bound.
    """
    count = span = 1
    for step, size in sorted((abs(step), size) for step, size in zip(stride, shape, strict=True)):
        if size == 0:
            return 0
        if step == 0 or size == 1:
            continue
        reach = (size - 1) * step + span
        count, span = min(count * size, reach), reach
    return count
