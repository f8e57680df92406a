"""How much memory a cell may take on its device, and holding its process to that.

A process that asks for more is refused and says so itself. One that the system kills because others took the
memory too is told by the kernel's count of such kills.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from functools import cache
from pathlib import Path

from bench.config.spec import CellSpec
from bench.measure import nvml
from bench.process import cgroups, forkserver

UNLIMITED = sys.maxsize
"""Where nothing is asked for and the device does not say what it has."""
OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
FIRST_TO_GO = 1000
"""The highest `oom_score_adj`: where memory runs out, the kernel kills the cell and not who started it."""

SETTLE_SECONDS = 10.0
"""Longest wait for a device's memory to come back; drivers take well under a second."""
SETTLED_BYTES = 2**24
"""By which a device's memory in use may differ and be called the same: a driver's own comes and goes."""


def memory_bytes(spec: CellSpec) -> int:
    """Bytes that a cell may take on its device, beside what its process has before it begins.

    It is `measure.limit_bytes`, or what is free on the device now: of the CPU's memory, what is left in this
    process's control groups if that is less. `UNLIMITED` where the device does not say.
    """
    if spec.measure.limit_bytes is not None:
        return int(spec.measure.limit_bytes)
    if spec.device != "cpu":
        return _free_on(spec.device)
    left = [size for size in (available_bytes(), cgroups.free_bytes()) if size is not None]
    return min(left, default=UNLIMITED)


def available_bytes(proc: Path = cgroups.PROC) -> int | None:
    """The machine's memory that can be had without swapping (MemAvailable in proc.rst of the kernel's
    documentation), or None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def hold(spec: CellSpec, limit: int) -> None:
    """Hold this process, which is the cell's own, to `limit` bytes on the cell's device.

    On the CPU the system refuses it more private writable memory (RLIMIT_DATA), and torch raises; on an
    accelerator its allocator does. What the process has now, and the stacks of threads to come, are not
    counted. The kernel will choose this process where it has to kill one.
    """
    if OOM_SCORE_ADJ.exists():
        OOM_SCORE_ADJ.write_text(str(FIRST_TO_GO))
    if limit == UNLIMITED or not spec.measure.execute:
        return
    import torch

    if spec.device == "cpu":
        from bench.measure.memory import resident_bytes

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        total = (resident_bytes("VmData") or 0) + _stack_bytes(torch.get_num_threads()) + limit
        within = min(total, UNLIMITED if most == resource.RLIM_INFINITY else most)
        resource.setrlimit(resource.RLIMIT_DATA, (within, most))
    elif torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(spec.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), spec.device)


def _stack_bytes(threads: int) -> int:
    """Stacks of the threads that torch may start: two pools, since the backward pass can have its own."""
    size, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (2 * threads + 2) * (2**23 if size == resource.RLIM_INFINITY else size)


def _free_on(device: str) -> int:
    """Free memory of an accelerator, by its driver, which is asked without taking any of it."""
    uuid = device_uuid(device)
    memory = nvml.memory(uuid) if uuid else None
    return UNLIMITED if memory is None else memory.free_bytes


def settle(device: str) -> int | None:
    """Wait until a device's memory has returned from the cell before, and say what has not: `leftover_bytes`.
    Of the CPU there is nothing to say: a process's memory is back when it has ended."""
    uuid = device_uuid(device) if device != "cpu" else None
    return leftover_bytes(uuid) if uuid else None


_least_used: dict[str, int] = {}
"""Device → the least of its memory that was in use before any cell of this process."""


def leftover_bytes(uuid: str, seconds: float = SETTLE_SECONDS) -> int | None:
    """What is in use on a device beyond the least before an earlier cell; 0 where its memory has returned.

    The driver takes memory back some time after a process has ended, so this waits, but not for ever. None
    where the driver does not tell.
    """
    deadline = time.monotonic() + seconds
    while (memory := nvml.memory(uuid)) is not None:
        least = _least_used[uuid] = min(memory.used_bytes, _least_used.get(uuid, memory.used_bytes))
        beyond = memory.used_bytes - least
        if beyond <= SETTLED_BYTES:
            return 0
        if time.monotonic() > deadline:
            return beyond
        time.sleep(0.05)
    return None


@cache
def device_uuid(device: str) -> str | None:
    """The driver's name of an accelerator, None where there is none. torch knows it, but begins to use the
    device when asked, and would hold memory there for as long as this process lives; so another is asked."""
    return forkserver.ask(nvml.uuid, device)
