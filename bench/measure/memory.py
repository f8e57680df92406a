"""Peak memory of a training step.

On the CPU: bytes of live tensor storages, tracked operation by operation. The figure is exact and
reproducible to the byte. Under FakeTensorMode the same code gives a prediction. Memory that a kernel
allocates and frees internally is not included. On an accelerator: the peak of the caching allocator.
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
"""Labels of live memory; `workspace` is memory without another label."""


@dataclass
class _Entry:
    """A live storage."""

    size: int
    number: int
    """Storages are numbered in the order in which they are first seen."""
    label: str = "workspace"


class Recording:
    """A recording of the storages that are created while it is active."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}
        """Number → size of the storages that are still live."""
        self.peak = 0
        """Maximum bytes of these storages that were live at the same time."""
        self.highest = 0
        """The number of the last storage that was created before this peak."""
        self._live = 0

    def made(self, number: int, size: int) -> None:
        """Record a new storage."""
        self.kept[number] = size
        self._live += size
        if self._live > self.peak:
            self.peak, self.highest = self._live, number

    def freed(self, number: int) -> None:
        """Record that a storage is freed; storages created before the recording are ignored."""
        self._live -= self.kept.pop(number, 0)


class LiveStorage(TorchDispatchMode):
    """Context manager that counts the bytes of every storage returned by an operation inside it, until the
    storage is freed. A storage that is resized in place keeps the size with which it was first seen.

    `live` is the current sum, `peak` its maximum since `reset_peak`, and `at_peak` divides the peak by label.
    The count stays correct if tensors are freed after the context has ended, because storages have
    finalizers. Memory that compiled code allocates is counted when an operation outside the compiled code
    returns it.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code runs compiled, as without this mode."""
        return True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.seen = 0
        """Number of storages so far, including freed ones."""
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, _Entry] = weakref.WeakKeyDictionary()
        self.labelled = dict.fromkeys(LABELS, 0)
        """The current sum by label."""
        self._recordings: list[Recording] = []
        self._expected: _Entry | None = None
        """The already counted entry of the next storage."""
        self.reset_peak()

    def reset_peak(self) -> None:
        """Set the peak to the current sum."""
        self._take_peak()

    def _take_peak(self) -> None:
        self.peak, self._seen_at_peak = self.live, self.seen
        self.at_peak = dict(self.labelled)

    def label(self, tensors: Any, label: str) -> None:
        """Label the storages of a nested structure of tensors; also updates the labels of the peak."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor) and (entry := self._known.get(tensor.untyped_storage())):
                self._move(entry, label)

    def label_since(self, number: int, label: str) -> None:
        """Label every unlabelled storage whose number is greater than `number`."""
        for entry in list(self._known.values()):
            if entry.number > number and entry.label == "workspace":
                self._move(entry, label)

    def _move(self, entry: _Entry, label: str) -> None:
        before, entry.label = entry.label, label
        sums = [self.labelled]
        if entry.number <= self._seen_at_peak:  # it existed at the peak, and is still live
            sums.append(self.at_peak)
        for sizes in sums:
            sizes[before] -= entry.size
            sizes[label] += entry.size

    def number(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor's storage."""
        return self._known[tensor.untyped_storage()].number

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record the storages created inside the context; the recording is complete at its end."""
        recording = Recording()
        self._recordings.append(recording)
        try:
            yield recording
        finally:
            self._recordings.remove(recording)

    def replay(self, recording: Recording) -> Callable[[int], torch.Tensor]:
        """Repeat a recording without running its operations. The returned function maps the number of a
        storage that is still live to a tensor of uninitialised bytes, always the same tensor for a number."""
        entries = {
            number: self._made(size) for number, size in recording.kept.items() if number <= recording.highest
        }
        self._freed(self._made(recording.peak - sum(entry.size for entry in entries.values())))
        entries |= {
            number: self._made(size) for number, size in recording.kept.items() if number > recording.highest
        }
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
        for recording in self._recordings:
            recording.made(entry.number, size)
        return entry

    def _freed(self, entry: _Entry) -> None:
        self.live -= entry.size
        self.labelled[entry.label] -= entry.size
        for recording in self._recordings:
            recording.freed(entry.number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # two thirds of the operations that fake tensors dispatch
            return getattr(args[0], "fake_device", None) or func(*args)
        out = func(*args, **(kwargs or {}))
        for value in (out,) if isinstance(out, torch.Tensor) else tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._follow(value)
        return out


def tensor_bytes(tensors: Any) -> int:
    """Return the bytes of all elements of a nested structure of tensors."""
    return sum(t.numel() * t.element_size() for t in tree_iter(tensors) if isinstance(t, torch.Tensor))


def reset_rss_peak() -> bool:
    """Reset the kernel's peak resident size of this process; returns False if this is not possible."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(key: str) -> int | None:
    """Return a size from /proc/self/status (VmHWM: peak resident, VmRSS: resident), in bytes; None if it is
    not available."""
    try:
        match = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None
