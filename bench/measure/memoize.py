"""Following repeated work once: the planner's side of `variants.ops.memoizable`.

The first time, work is gone through under the counters, and it is noted how much was live in it at most and
what it leaves. When it comes again with arguments of the same shapes, that is played back: the peak, its
split, the FLOPs, the launches and the bytes moved are the same as if each operation had been dispatched.
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
from variants.ops.backends import note_work


@dataclass(frozen=True)
class _Argument:
    """A result that is one of the arguments."""

    index: int


@dataclass(frozen=True)
class _View:
    """Where a result lies: in the storage that the work made under that number, or in that argument's, with
    the offset from where the argument begins."""

    made: bool
    number: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Value:
    """A result that is no tensor."""

    value: Any


@dataclass(frozen=True)
class _Known:
    """What work does."""

    storage: Recording
    counts: Counts
    results: list[_Argument | _View | _Value]
    spec: TreeSpec


class Repeats:
    """A follower for `variants.ops.memoizable.following`, on fake tensors alone: results hold no numbers."""

    def __init__(self, storage: LiveStorage) -> None:
        self.storage = storage
        self._known: dict[Any, _Known] = {}

    def __call__(self, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Do the work, or what is known of it."""
        leaves = tree_leaves(args)
        key = work, torch.is_autocast_enabled("cpu"), described(args, [])
        with _counters_alone():
            if key in self._known:
                return self._again(self._known[key], leaves)
            with CountFlops() as counter, self.storage.recording() as recording:
                results = work(*args)
        self._known[key] = self._noted(work, recording, counter.counts, results, leaves)
        return results

    def _noted(
        self, work: Callable[..., Any], recording: Recording, counts: Counts, results: Any, leaves: list[Any]
    ) -> _Known:
        found, spec = tree_flatten(results)
        given = {id(leaf.untyped_storage()): i for i, leaf in enumerate(leaves) if _is_tensor(leaf)}

        def noted(value: Any) -> _Argument | _View | _Value:
            for i, leaf in enumerate(leaves):
                if leaf is value:
                    return _Argument(i)
            if not _is_tensor(value):
                return _Value(value)
            number, offset = self.storage.number(value), value.storage_offset()
            if made := number in recording.kept:
                place = number
            else:
                place = given[id(value.untyped_storage())]
                offset -= leaves[place].storage_offset()
            return _View(made, place, value.dtype, tuple(value.size()), value.stride(), offset)

        places = [noted(value) for value in found]
        left = recording.kept.keys() - {p.number for p in places if isinstance(p, _View) and p.made}
        if left:
            raise RuntimeError(
                f"{work.__qualname__} is not repeatable: it keeps {len(left)} tensors elsewhere"
            )
        return _Known(recording, counts, places, spec)

    def _again(self, known: _Known, leaves: list[Any]) -> Any:
        note_work(*known.counts)
        made = self.storage.replay(known.storage)

        def result(noted: _Argument | _View | _Value) -> Any:
            match noted:
                case _Argument(index):
                    return leaves[index]
                case _Value(value):
                    return value
                case _View(True, number, dtype, size, stride, offset):
                    return made(number).view(dtype).as_strided(size, stride, offset)
                case _View(False, number, dtype, size, stride, offset):
                    whole = leaves[number].view(dtype)
                    return whole.as_strided(size, stride, whole.storage_offset() + offset)

        return tree_unflatten([result(noted) for noted in known.results], known.spec)


@contextmanager
def _counters_alone() -> Iterator[None]:
    """Hide operations from whoever else watches, because there are fewer of them when work comes again:
    selective checkpointing would miss them in its second pass."""
    with ExitStack() as inside:
        for mode in inside.enter_context(_disable_current_modes()):
            if isinstance(mode, (FakeTensorMode, LiveStorage, DispatchedWork)):
                inside.enter_context(mode)
        yield


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def described(value: Any, storages: list[int]) -> Any:
    """All that costs may depend on: shapes, which tensors share a storage, and other values as they are."""
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
