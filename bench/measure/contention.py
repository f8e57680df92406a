"""Contention while samples are taken: load from other processes, and whether it contaminates the samples.

A process can only measure how long its work took, not whether another process used the cores. The system
provides this information: it counts the time that threads were ready but had no core, and the time that each
core was busy. The driver of an accelerator reports why its clock is reduced and which other processes use it.

Observed on two cores, in intervals of 0.1 to 0.4 s of training steps at 512 tokens on two threads, which took
34 to 40 ms on an idle machine:

| other load | `wait_share` | `foreign_cores` | `cpu_share` | step |
|---|---|---|---|---|
| processes of the lowest priority | 0.04–0.07 | 0.04–0.18 | 0.92–0.96 | 37–48 ms |
| one process that keeps a core busy | 0.28–0.41 | 0.67–0.88 | 0.56–0.67 | 80–110 ms (once 262) |
| two such processes | 0.50–0.53 | 1.07–1.16 | 0.43–0.47 | 116–143 ms |

With one thread and one such process, each has its own core: `wait_share` is 0.000–0.003, `foreign_cores` 1.0,
and the step does not take longer. The system's load average changes too slowly to judge such short intervals.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import nvml

MAX_WAIT_SHARE = 0.03
"""Maximum accepted `wait_share`.
All threads wait for the slowest one, so a share of 4 % makes a step 5 to 25 % slower."""
CORE_TOLERANCE = 0.5
"""Tolerance, in cores, for the sum of foreign cores and threads. This criterion is for systems that do not
report waiting times, and for other guests of a hypervisor, which do not appear in them. Clock ticks are
coarse: over 0.1 s the error is 0.2 cores."""
MIN_SECONDS = 0.08
"""Minimum interval for which `foreign_cores` is computed. The system counts ticks of 10 ms: over an interval
of 1 ms, one tick of another process would count as ten cores."""
HARMLESS_THROTTLING = {None, "none", "power cap"}
"""Values of `gpu_throttling` that do not contaminate a sample.
At its power cap a device runs as in any long workload."""


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Load during one interval of sampling, by record key; None if the system does not report a figure."""

    load_before: float
    """Load average over the last minute (running and runnable processes) at the start of the interval."""
    load_after: float
    """The same at the end."""
    cpu_share: float
    """CPU seconds of this process ÷ (wall-clock seconds × threads)."""
    wait_share: float | None
    """Time that threads of this process were ready to run but had no
    core ÷ (wall-clock seconds × threads)."""
    foreign_cores: float | None
    """Average number of cores, of those that this process may use, that other processes kept busy; None for
    an interval shorter than `MIN_SECONDS`."""
    device: nvml.DeviceState = nvml.UNKNOWN_STATE

    def figures(self) -> dict[str, Any]:
        """Return the figures by record key."""
        own = asdict(self)
        del own["device"]
        return own | self.device.figures()

    def contaminated(self, *, threads: int, cores: int) -> str | None:
        """Return why samples taken during this interval are contaminated, or None.

        `threads` is the number of threads that the work keeps busy on the host, `cores` the number of cores
        that it may use.
        """
        throttling, others = self.device.gpu_throttling, self.device.gpu_foreign_processes
        # The driver's information is exact; the shares of the cores are estimates.
        if throttling not in HARMLESS_THROTTLING:
            return f"the device was throttled: {throttling}"
        if others:
            return f"{others} other process{'es' if others > 1 else ''} on the device"
        if self.wait_share is not None and self.wait_share > MAX_WAIT_SHARE:
            return f"the cell's threads had no core {self.wait_share:.0%} of the time"
        if self.foreign_cores is not None and self.foreign_cores + threads > cores + CORE_TOLERANCE:
            return (
                f"others kept {self.foreign_cores:.1f} of {cores} cores busy; the cell has {threads} threads"
            )
        return None


class ContentionMonitor:
    """Measures the load of this process and of others, from construction to `end`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = nvml.read(device)
        self.load = os.getloadavg()[0]
        self.begun = Counters()

    def joules(self) -> float | None:
        """Return the device's energy consumption since construction; None if the driver does not count it."""
        begun, now = self.state.joules, nvml.read(self.device).joules
        return None if begun is None or now is None else now - begun

    def end(self) -> dict[str, Any]:
        """Return the load since construction, and `contaminated`, by record key."""
        begun, ended = self.begun, Counters()
        seconds, used = ended.clock - begun.clock, ended.used - begun.used
        threads = torch.get_num_threads()
        load = Contention(
            load_before=self.load,
            load_after=os.getloadavg()[0],
            cpu_share=used / (seconds * threads),
            wait_share=_share(begun.waited, ended.waited, seconds * threads),
            foreign_cores=foreign_cores(begun, ended),
            device=_worst_of(self.state, nvml.read(self.device)),
        )
        on_host = threads if self.device.type == "cpu" else 1
        return load.figures() | {"contaminated": load.contaminated(threads=on_host, cores=len(cores()))}


class Counters:
    """The system's counters at one time, in seconds; None if the system does not report one."""

    def __init__(self) -> None:
        self.clock = time.perf_counter()
        self.used = time.process_time()
        self.waited = waited_seconds()
        self.busy = busy_seconds()


def _share(begun: float | None, ended: float | None, of: float, *, less: float = 0.0) -> float | None:
    return None if begun is None or ended is None else max(0.0, ended - begun - less) / of


def foreign_cores(begun: Counters, ended: Counters) -> float | None:
    """Return the average number of cores that others kept busy;
    None for a short interval or without counters."""
    seconds = ended.clock - begun.clock
    if seconds < MIN_SECONDS:
        return None
    return _share(begun.busy, ended.busy, seconds, less=ended.used - begun.used)


def cores() -> set[int]:
    """Return the indices of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return {*range(os.cpu_count() or 1)}


def _worst_of(before: nvml.DeviceState, after: nvml.DeviceState) -> nvml.DeviceState:
    """Return the state at the end, with the throttling and foreign processes of whichever end has them."""
    throttling = (
        after.gpu_throttling if before.gpu_throttling in HARMLESS_THROTTLING else before.gpu_throttling
    )
    others = [n for n in (before.gpu_foreign_processes, after.gpu_foreign_processes) if n is not None]
    return replace(after, gpu_throttling=throttling, gpu_foreign_processes=max(others, default=None))


def waited_seconds() -> float | None:
    """Return the time that the threads of this process were ready to run but had no core, which Linux counts
    in nanoseconds (/proc/…/schedstat; sched-stats.rst of the kernel's documentation)."""
    try:
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:  # a thread that has just ended
        return None
    return sum(int(line.split()[1]) for line in threads) * 1e-9 if threads else None


def busy_seconds() -> float | None:
    """Return the total time that the cores which this process may use have been busy, for any process or for
    other guests of the hypervisor (/proc/stat; proc.rst of the kernel's documentation)."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{core}" for core in cores()}
    total = 0
    for line in lines:
        name, *ticks = line.split()
        if name in ours:
            user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")
