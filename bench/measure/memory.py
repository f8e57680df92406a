"""Peak memory of a training step.

On the CPU: bytes of live tensor storages, followed operation by operation. It is exact, repeats to
the byte, and works the same under FakeTensorMode, where it becomes a prediction. What a kernel
allocates for itself and frees before it returns is not in it. On an accelerator: the caching
allocator's own peak.
"""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class LiveStorage(TorchDispatchMode):
    """Context manager that follows the bytes of every storage that an operation inside it returns, until
    the storage is freed. A storage that is resized in place keeps the size it was first seen with.

    `live` is the current sum and `peak` its maximum since `reset_peak`. Leave the context before the
    tensors die and the count stays right: storages report their own end.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def reset_peak(self) -> None:
        """Forget the maximum so far."""
        self.peak = self.live

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
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
