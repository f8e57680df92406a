"""The memory limit of a cell on its device, and its enforcement in the cell's process.

A process that requests more memory gets an error, which it reports itself. If the system kills the process
because other processes use the memory too, the kernel's count of out-of-memory kills shows it.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

from bench.config.spec import CellSpec
from bench.measure import nvml
from bench.process import cgroups
from bench.run.devices import CPU, Device

UNLIMITED = sys.maxsize
"""The limit if none is set and the device does not report its memory."""
OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")
FIRST_TO_GO = 1000
"""The highest `oom_score_adj`: if memory runs out, the kernel kills the cell rather than its parent."""

RELEASE_SECONDS = 10.0
"""Maximum wait for a device's memory to be released; drivers usually take well under a second."""
RELEASED_BYTES = 2**24
"""Tolerated change of a device's memory in use, because the driver's own memory varies."""


def memory_bytes(spec: CellSpec, device: Device = CPU) -> int:
    """Return the bytes that a cell may allocate on a device, in addition to what its process has at the
    start.

    This is `measure.limit_bytes`, or the memory that is free on the device now; on the CPU, at most the free
    memory of this process's control groups. `UNLIMITED` if the device does not report its memory.
    """
    if spec.measure.limit_bytes is not None:
        return int(spec.measure.limit_bytes)
    if device.kind != CPU.kind:
        return _free_on(device)
    available = [size for size in (available_bytes(), cgroups.free_bytes()) if size is not None]
    return min(available, default=UNLIMITED)


def available_bytes(proc: Path = cgroups.PROC) -> int | None:
    """Return the machine's memory that is available without swapping (MemAvailable in proc.rst of the
    kernel's documentation), or None if the system does not report it."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def enforce(spec: CellSpec, limit: int) -> None:
    """Limit this process, which must be the cell's own, to `limit` bytes on the cell's device.

    On the CPU the system refuses more private writable memory (RLIMIT_DATA), and torch raises; on an
    accelerator torch's allocator enforces the limit. The memory that the process has now and the stacks of
    future threads do not count. If the kernel must kill a process, it will choose this one.
    """
    if OOM_SCORE_ADJ.exists():
        OOM_SCORE_ADJ.write_text(str(FIRST_TO_GO))
    if limit == UNLIMITED or not spec.measure.execute:
        return
    import torch

    if spec.device == "cpu":
        from bench.measure.memory import resident_bytes

        _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
        total = (resident_bytes("VmData") or 0) + _stack_bytes(torch.get_num_threads()) + limit
        within = min(total, UNLIMITED if hard_limit == resource.RLIM_INFINITY else hard_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (within, hard_limit))
    elif torch.cuda.is_available():
        total = torch.cuda.get_device_properties(spec.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), spec.device)


def after_context(spec: CellSpec, limit: int) -> int:
    """Return the bytes that this process, which must be the cell's own, may allocate on the cell's device.

    That is `limit`, or the memory that is free once the process has what it cannot do without: the device's
    context and the workspaces of the library for matrix products, together several hundred MiB. The parent
    process cannot know them, because they belong to each process.
    """
    if spec.device == CPU.kind or not spec.measure.execute:
        return limit
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type != spec.device:  # the cell reports it
        return limit
    module = torch.get_device_module(spec.device)
    square = torch.ones(64, 64, device=spec.device, requires_grad=True)
    (square @ square).sum().backward()  # autograd's thread has a workspace of its own
    module.synchronize(spec.device)
    free, _ = module.mem_get_info(spec.device)
    return min(limit, int(free))


def _stack_bytes(threads: int) -> int:
    """Return the size of the stacks of torch's threads:
    two pools, because the backward pass may have its own."""
    size, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return (2 * threads + 2) * (2**23 if size == resource.RLIM_INFINITY else size)


def _free_on(device: Device) -> int:
    """Return the free memory of an accelerator, queried from its driver without allocating any."""
    memory = nvml.memory(device.uuid) if device.uuid else None
    return UNLIMITED if memory is None else memory.free_bytes


def await_release(device: Device) -> int | None:
    """Wait until a device's memory is released by the previous cell; returns `leftover_bytes`. None for the
    CPU, where the memory of a process is released when it ends."""
    return leftover_bytes(device.uuid) if device.uuid else None


_least_used: dict[str, int] = {}
"""UUID of a device → the minimum of its memory in use before any cell of this process."""


def leftover_bytes(uuid: str, seconds: float = RELEASE_SECONDS) -> int | None:
    """Return the device memory in use beyond the minimum before any earlier cell; 0 if it has been released.

    The driver releases memory some time after a process has ended, so this function waits up to `seconds`.
    None if the driver does not report the memory.
    """
    deadline = time.monotonic() + seconds
    while (memory := nvml.memory(uuid)) is not None:
        idle = _least_used[uuid] = min(memory.used_bytes, _least_used.get(uuid, memory.used_bytes))
        beyond = memory.used_bytes - idle
        if beyond <= RELEASED_BYTES:
            return 0
        if time.monotonic() > deadline:
            return beyond
        time.sleep(0.05)
    return None
