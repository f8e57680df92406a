"""What else went on while samples were taken, and whether it spoils them.

A process sees only how long its work took, not that another one had the cores meanwhile. The system
does: it counts the time that threads were ready and had no core, and the time that each core was busy; the
driver of an accelerator knows what lowers its clock and who else uses it.

Seen on two cores, in windows of 0.1 to 0.4 s of training steps at 512 tokens on two threads, which took 34 to
40 ms on a quiet machine:

| beside | `wait_share` | `foreign_cores` | `cpu_share` | step |
|---|---|---|---|---|
| processes of the lowest weight | 0.04–0.07 | 0.04–0.18 | 0.92–0.96 | 37–48 ms |
| one that keeps a core busy | 0.28–0.41 | 0.67–0.88 | 0.56–0.67 | 80–110 ms (once 262) |
| two of them | 0.50–0.53 | 1.07–1.16 | 0.43–0.47 | 116–143 ms |

On one thread beside one of them, each has a core: `wait_share` 0.000–0.003, `foreign_cores` 1.0, and the step
takes no longer. The system's load follows too slowly to judge a window by.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.measure import nvml

WAITED = 0.03
"""Most of the time that threads may have been without a core. All wait for the slowest of them, so 4 % cost a
step 5 to 25 %."""
SPARE = 0.5
"""Cores that others may take of those that the threads need: for a system that does not tell the waiting, and
for other guests of a hypervisor, which it does not show. Ticks are coarse: 0.1 s is off by 0.2."""
SHORTEST_SECONDS = 0.08
"""Length of the shortest window for which the ticks of the cores are counted. The system adds one tick of
10 ms at a time: over 1 ms, one tick of another process reads as ten cores."""
AS_EVER = {None, "none", "power cap"}
"""What may lower a device's clock without spoiling a sample: at its power cap it runs as in any long work."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Of one window of samples, by the record's keys; None: the system does not say."""

    load_before: float
    """Mean number of processes, over the last minute, that ran or were ready to as the window began."""
    load_after: float
    """The same as it ended."""
    cpu_share: float
    """CPU seconds of this process over wall clock × threads."""
    wait_share: float | None
    """Time that threads of this process were ready to run and had no core, over wall clock × threads."""
    foreign_cores: float | None
    """Cores, of those this process may use, that others kept busy, on average; None for a window that is too
    short to tell (`SHORTEST_SECONDS`)."""
    device: nvml.DeviceState = nvml.UNTOLD

    def figures(self) -> dict[str, Any]:
        """By the record's keys."""
        own = asdict(self)
        del own["device"]
        return own | self.device.figures()

    def contaminated(self, *, threads: int, cores: int) -> str | None:
        """Why samples taken in these surroundings are not to be trusted; None where they are.

        `threads` is how many the work keeps busy on the host, `cores` how many it may use.
        """
        throttling, others = self.device.gpu_throttling, self.device.gpu_foreign_processes
        # The driver knows; the shares of the cores are estimates.
        if throttling not in AS_EVER:
            return f"its device was slowed down: {throttling}"
        if others:
            return f"{others} other process{'es' if others > 1 else ''} on its device"
        if self.wait_share is not None and self.wait_share > WAITED:
            return f"its threads had no core {self.wait_share:.0%} of the time"
        if self.foreign_cores is not None and self.foreign_cores + threads > cores + SPARE:
            return f"others kept {self.foreign_cores:.1f} of {cores} cores busy, and it has {threads} threads"
        return None


class Window:
    """From its making to `end`: what this process and the others on the machine used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.state = nvml.read(device)
        self.load = os.getloadavg()[0]
        self.begun = Counters()

    def joules(self) -> float | None:
        """Energy that the device has drawn since; None where the driver has no count."""
        begun, now = self.state.joules, nvml.read(self.device).joules
        return None if begun is None or now is None else now - begun

    def end(self) -> dict[str, Any]:
        """What went on since, and `contaminated`, by the record's keys."""
        begun, ended = self.begun, Counters()
        seconds, used = ended.clock - begun.clock, ended.used - begun.used
        threads = torch.get_num_threads()
        seen = Surroundings(
            load_before=self.load,
            load_after=os.getloadavg()[0],
            cpu_share=used / (seconds * threads),
            wait_share=_share(begun.waited, ended.waited, seconds * threads),
            foreign_cores=foreign_cores(begun, ended),
            device=_worse(self.state, nvml.read(self.device)),
        )
        on_host = threads if self.device.type == "cpu" else 1
        return seen.figures() | {"contaminated": seen.contaminated(threads=on_host, cores=len(_cores()))}


class Counters:
    """At one time, in seconds; None where the system does not say."""

    def __init__(self) -> None:
        self.clock = time.perf_counter()
        self.used = time.process_time()
        self.waited = waited_seconds()
        self.busy = busy_seconds()


def _share(begun: float | None, ended: float | None, of: float, *, less: float = 0.0) -> float | None:
    return None if begun is None or ended is None else max(0.0, ended - begun - less) / of


def foreign_cores(begun: Counters, ended: Counters) -> float | None:
    """Cores that others kept busy, on average; None where it is too short or nothing counts."""
    seconds = ended.clock - begun.clock
    if seconds < SHORTEST_SECONDS:
        return None
    return _share(begun.busy, ended.busy, seconds, less=ended.used - begun.used)


def _cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return {*range(os.cpu_count() or 1)}


def _worse(before: nvml.DeviceState, after: nvml.DeviceState) -> nvml.DeviceState:
    """The state at the window's end, with what spoilt either end of it."""
    throttling = after.gpu_throttling if before.gpu_throttling in AS_EVER else before.gpu_throttling
    others = [n for n in (before.gpu_foreign_processes, after.gpu_foreign_processes) if n is not None]
    return replace(after, gpu_throttling=throttling, gpu_foreign_processes=max(others, default=None))


def waited_seconds() -> float | None:
    """How long the threads of this process were ready to run and had no core, as Linux counts it in
    nanoseconds (/proc/…/schedstat; sched-stats.rst of the kernel's documentation)."""
    try:
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
    except OSError:  # a thread that has just ended
        return None
    return sum(int(line.split()[1]) for line in threads) * 1e-9 if threads else None


def busy_seconds() -> float | None:
    """How long the cores that this process may use have been busy, whoever had them: a hypervisor's other
    guests too (/proc/stat; proc.rst of the kernel's documentation)."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{core}" for core in _cores()}
    total = 0
    for line in lines:
        name, *ticks = line.split()
        if name in ours:
            user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK")
