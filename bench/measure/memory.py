"""Peak memory of a training step.

On the CPU: bytes of live tensor storages, followed operation by operation. It is exact, repeats to
the byte, and works the same under FakeTensorMode, where it becomes a prediction. What a kernel
allocates for itself and frees before it returns is not in it. On an accelerator: the caching
allocator's own peak.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


LABELS = ("parameters", "gradients", "optimizer", "activations", "workspace")
"""What a live byte is for; workspace is what has no other label."""


@dataclass
class _Entry:
    """A live storage."""

    size: int
    number: int
    """Storages are numbered as they are first seen."""
    label: str = "workspace"


class Notes:
    """What happens to storages that come while notes are taken."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}
        """Number → size of those that are still there."""
        self.peak = 0
        """The most bytes of them that were there at once."""
        self.highest = 0
        """The number of the latest of them by then."""
        self._live = 0

    def made(self, number: int, size: int) -> None:
        """A storage is first seen."""
        self.kept[number] = size
        self._live += size
        if self._live > self.peak:
            self.peak, self.highest = self._live, number

    def freed(self, number: int) -> None:
        """A storage is freed; others than those that came belong to whoever held them before."""
        self._live -= self.kept.pop(number, 0)


class LiveStorage(TorchDispatchMode):
    """Context manager that follows the bytes of every storage that an operation inside it returns, until
    the storage is freed. A storage that is resized in place keeps the size it was first seen with.

    `live` is the current sum and `peak` its maximum since `reset_peak`; `at_peak` splits the peak by
    label. Leave the context before the tensors die and the count stays right: storages report their own
    end. What compiled code allocates is seen once an operation outside it returns it.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled, as it would unobserved."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.seen = 0
        """Storages so far, freed ones included."""
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, _Entry] = weakref.WeakKeyDictionary()
        self.labelled = dict.fromkeys(LABELS, 0)
        """The current sum, by label."""
        self._notes: list[Notes] = []
        self._expected: _Entry | None = None
        """What the next storage seen is already counted as."""
        self.reset_peak()

    def reset_peak(self) -> None:
        """Forget the maximum so far."""
        self._take_peak()

    def _take_peak(self) -> None:
        self.peak, self._seen_at_peak = self.live, self.seen
        self.at_peak = dict(self.labelled)

    def label(self, tensors: Any, label: str) -> None:
        """Say what the storages of any nest of tensors are for; the peak's split is put right too."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor) and (entry := self._known.get(tensor.untyped_storage())):
                self._move(entry, label)

    def label_since(self, number: int, label: str) -> None:
        """The same for every storage without a label that was first seen after `number` others."""
        for entry in list(self._known.values()):
            if entry.number > number and entry.label == "workspace":
                self._move(entry, label)

    def _move(self, entry: _Entry, label: str) -> None:
        before, entry.label = entry.label, label
        sums = [self.labelled]
        if entry.number <= self._seen_at_peak:  # it is live now, so it was then
            sums.append(self.at_peak)
        for sizes in sums:
            sizes[before] -= entry.size
            sizes[label] += entry.size

    def number(self, tensor: torch.Tensor) -> int:
        """Of a tensor's storage."""
        return self._known[tensor.untyped_storage()].number

    @contextmanager
    def noting(self) -> Iterator[Notes]:
        """Notes of what happens inside, complete at its end."""
        notes = Notes()
        self._notes.append(notes)
        try:
            yield notes
        finally:
            self._notes.remove(notes)

    def replay(self, notes: Notes) -> Callable[[int], torch.Tensor]:
        """Let the same happen again without a tensor. Storages that came and are still there get one from
        the function returned, given their number: bytes, uninitialised, and the same when asked twice."""
        entries = {number: self._made(size) for number, size in notes.kept.items() if number <= notes.highest}
        self._freed(self._made(notes.peak - sum(entry.size for entry in entries.values())))
        entries |= {number: self._made(size) for number, size in notes.kept.items() if number > notes.highest}
        tensors: dict[int, torch.Tensor] = {}

        def tensor(number: int) -> torch.Tensor:
            if number not in tensors:
                self._expected = entries[number]
                tensors[number] = torch.empty(entries[number].size, dtype=torch.uint8)
            return tensors[number]

        return tensor

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        expected, self._expected = self._expected, None
        entry = self._known[storage] = expected or self._made(storage.nbytes())
        weakref.finalize(storage, self._freed, entry).atexit = False

    def _made(self, size: int) -> _Entry:
        self.seen += 1
        entry = _Entry(size, self.seen)
        self.live += size
        self.labelled[entry.label] += size
        if self.live > self.peak:
            self._take_peak()
        for notes in self._notes:
            notes.made(entry.number, size)
        return entry

    def _freed(self, entry: _Entry) -> None:
        self.live -= entry.size
        self.labelled[entry.label] -= entry.size
        for notes in self._notes:
            notes.freed(entry.number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of what fake tensors dispatch
            return getattr(args[0], "fake_device", None) or func(*args)
        out = func(*args, **(kwargs or {}))
        for value in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._follow(value)
        return out


def tensor_bytes(tensors: Any) -> int:
    """Bytes of the elements of any nest of tensors."""
    return sum(t.numel() * t.element_size() for t in tree_iter(tensors) if isinstance(t, torch.Tensor))


def reset_rss_peak() -> bool:
    """Ask the kernel to forget this process's peak resident size; False where it cannot."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(key: str) -> int | None:
    """A size from /proc/self/status (VmHWM: peak resident, VmRSS: resident), or None without it."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
