"""Memoization of repeatable functions in a plan (see `variants.ops.memoizable`).

The first call of a function is run under the counters, and its effects are recorded: the peak memory, the
FLOPs, launches and bytes moved, and the shapes of the results. A later call with arguments of the same shapes
repeats these effects. The peak, its division by label and the counts are the same as if each operation had
been dispatched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from bench.measure.flops import CountFlops, DispatchedWork
from bench.measure.launches import Counts
from bench.measure.memory import LiveStorage, Recording
from variants.ops.fused.backends import note_work
from variants.ops.memoizable import Memoizer


@dataclass(frozen=True)
class _Argument:
    """A result that is one of the arguments."""

    index: int


@dataclass(frozen=True)
class _View:
    """A result that is a view of a storage."""

    is_new: bool
    """Whether the function created the storage; otherwise it belongs to an argument."""
    number: int
    """Number of the new storage in the recording, or index of the argument."""
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """From the start of the new storage or of the argument, in elements."""


@dataclass(frozen=True)
class _Value:
    """A result that is not a tensor."""

    value: Any


@dataclass(frozen=True)
class _Effects:
    """The recorded effects of a function."""

    storage: Recording
    counts: Counts
    results: list[_Argument | _View | _Value]
    spec: TreeSpec


class MemoizingStorage(LiveStorage, Memoizer):
    """Live storage of a plan, which runs each repeatable function once for each combination of shapes.

    For fake tensors only, because results that are repeated hold no numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self._effects: dict[Any, _Effects] = {}

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run the function, or repeat its recorded effects.

        Raises RuntimeError if the function stores new tensors anywhere but in its results.
        """
        leaves = tree_leaves(args)
        key = function, torch.is_autocast_enabled("cpu"), described(args, [])
        with _only_counting_modes():
            if key in self._effects:
                return self._repeat(self._effects[key], leaves)
            with CountFlops() as counter, self.recording() as recording:
                results = function(*args)
        self._effects[key] = self._effects_of(function, recording, counter.counts, results, leaves)
        return results

    def _effects_of(
        self,
        function: Callable[..., Any],
        recording: Recording,
        counts: Counts,
        results: Any,
        leaves: list[Any],
    ) -> _Effects:
        values, spec = tree_flatten(results)
        argument_of = {id(leaf.untyped_storage()): i for i, leaf in enumerate(leaves) if _is_tensor(leaf)}

        def describe(value: Any) -> _Argument | _View | _Value:
            for i, leaf in enumerate(leaves):
                if leaf is value:
                    return _Argument(i)
            if not _is_tensor(value):
                return _Value(value)
            number, offset = self.number(value), value.storage_offset()
            is_new = number in recording.kept
            if not is_new:
                number = argument_of[id(value.untyped_storage())]
                offset -= leaves[number].storage_offset()
            return _View(is_new, number, value.dtype, tuple(value.size()), value.stride(), offset)

        described_results = [describe(value) for value in values]
        returned = {view.number for view in described_results if isinstance(view, _View) and view.is_new}
        if stored := recording.kept.keys() - returned:
            raise RuntimeError(
                f"{function.__qualname__} is not repeatable: it stores {len(stored)} tensors elsewhere"
            )
        return _Effects(recording, counts, described_results, spec)

    def _repeat(self, effects: _Effects, leaves: list[Any]) -> Any:
        note_work(*effects.counts)
        new_storage = self.replay(effects.storage)

        def result(description: _Argument | _View | _Value) -> Any:
            match description:
                case _Argument(index):
                    return leaves[index]
                case _Value(value):
                    return value
                case _View(True, number, dtype, size, stride, offset):
                    return new_storage(number).view(dtype).as_strided(size, stride, offset)
                case _View(False, number, dtype, size, stride, offset):
                    base = leaves[number].view(dtype)
                    return base.as_strided(size, stride, base.storage_offset() + offset)

        return tree_unflatten([result(description) for description in effects.results], effects.spec)


@contextmanager
def _only_counting_modes() -> Iterator[None]:
    """Deactivate all dispatch modes but those that count.

    Selective checkpointing must not see the operations: there are fewer of them in its second pass.
    """
    with ExitStack() as inside:
        for mode in inside.enter_context(_disable_current_modes()):
            if isinstance(mode, (FakeTensorMode, LiveStorage, DispatchedWork)):
                inside.enter_context(mode)
        yield


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def described(value: Any, storages: list[int]) -> Any:
    """A hashable description of what the cost may depend on.

    Of tensors: dtype, device, shape, strides, and which of them share a storage. Other values: themselves.
    """
    if isinstance(value, torch.Tensor):
        storage = id(value.untyped_storage())
        if storage not in storages:
            storages.append(storage)
        return value.dtype, value.device, tuple(value.size()), value.stride(), storages.index(storage)
    if isinstance(value, dict):
        return tuple((key, described(item, storages)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), *(described(item, storages) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), *(described(getattr(value, f.name), storages) for f in dataclasses.fields(value))
    return value
