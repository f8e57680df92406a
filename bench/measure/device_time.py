"""Time that an accelerator is busy during a step, and time that the host needs to launch one operation.

On an accelerator the wall-clock time of a step is the larger of two times: that of the device's kernels, and
that of the host, which submits them one by one. If the host is slower, the wall-clock time measures Python
and not the attention variant. The profiler reports when each kernel ran; the union of these intervals is the
time that the device was busy. It does not depend on the host's speed, so variants can be compared by it.

Unlike a captured graph, the profiler accepts every step: with host synchronisation, with new shapes, and with
an optimiser that counts its steps on the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.measure.cached import load_or_measure
from bench.measure.timing import synchronize

STEPS = 3
"""Profiled steps. The times of kernels vary far less than wall-clock times."""
LAUNCHES = 2048
"""Launches of the measurement of the host's time: half of them in a forward pass, half in a backward pass."""
REPEATS = 5
BUSY_SHARE = 0.9
"""A step whose device is busy for a smaller share of the wall-clock time is launch-bound."""


def busy_seconds(work: Callable[[], object], device: torch.device) -> float | None:
    """Return the time that the device is busy during one run of `work`, in seconds.

    None on a CPU, which submits no work to itself, and if the profiler reports no kernel, for example because
    the driver does not allow tracing.
    """
    activity = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}.get(device.type)
    if activity is None or activity not in torch.profiler.supported_activities():
        return None
    synchronize(device)
    with profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            work()
        synchronize(device)
    intervals = (
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type != DeviceType.CPU and not event.is_user_annotation
    )
    busy = covered(intervals)
    return busy * 1e-6 / STEPS if busy else None


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end): kernels of several streams may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def is_launch_bound(busy: float | None, wall: float) -> bool | None:
    """Return whether a step's wall-clock time is the host's and not the device's; None without a device
    time."""
    return None if busy is None else busy < BUSY_SHARE * wall


def launch_seconds(folder: Path, device: torch.device, device_name: str | None) -> float | None:
    """Return the host's time for one launch, measured once for all cells of a run; None on a CPU.

    `folder` is the experiment's folder. A launch is one operation of a training step, with the work of Python
    and of autograd that belongs to it.
    """
    if device.type == "cpu":
        return None
    decides = [device.type, device_name, torch.__version__, torch.get_num_threads(), LAUNCHES]
    key = "launch_seconds"
    found = load_or_measure(folder / "launch", decides, lambda: {key: _launch_seconds(device)}, {key})
    return float(found[key])


def _launch_seconds(device: torch.device) -> float:
    """Return the fastest of several measurements: a forward and backward pass through a chain of operations
    on a tensor so small that the device waits for the host."""
    best = float("inf")
    for _ in range(REPEATS + 1):  # the first one loads kernels
        x = torch.zeros(16, device=device, requires_grad=True)
        synchronize(device)
        start = time.perf_counter()
        y = x
        for _ in range(LAUNCHES // 2):
            y = y.sin()
        torch.autograd.backward(y, torch.ones_like(y))
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best / LAUNCHES
