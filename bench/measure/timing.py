"""Wall-clock samples of a piece of work, with the device waited for.

Warm up, then sample until the budget is spent. The harness never concludes from the samples of one
process: two processes differ by more than either one's spread, so spread comes from replicates.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 1
"""Untimed runs before sampling. The step before them was already run for FLOPs and for memory."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; the CPU is always done."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


MOST_SAMPLES = 100
"""More would narrow the interval of one process, which is not the one that matters."""


def sample(work: Callable[[], object], device: torch.device, *, seconds: float, at_least: int) -> list[float]:
    """Seconds of each run of `work`: at least `at_least` samples, more until `seconds` are spent or
    there are `MOST_SAMPLES`."""
    for _ in range(WARM_UP):
        work()
    synchronize(device)
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < at_least or (len(samples) < MOST_SAMPLES and time.perf_counter() - begun < seconds):
        start = time.perf_counter()
        work()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return samples


def median(samples: list[float]) -> float:
    """The middle sample."""
    return statistics.median(samples)
