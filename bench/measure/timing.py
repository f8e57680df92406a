"""Wall-clock samples of a function, with device synchronisation.

Samples are taken until the 95 % interval of their median is narrow enough or the budget is used. Samples from
the warm-up phase, while the times still decrease, are dropped. The harness never draws conclusions from the
samples of a single process: two processes differ by more than the spread within each, so the spread is taken
over replicates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from scipy.stats import binom, kendalltau

WARM_UP, ACCELERATOR_WARM_UP = 1, 3
"""Untimed runs before sampling, on a CPU and on an accelerator, where libraries choose kernels and clocks
rise during the first runs. The step has already run before, to count FLOPs and to measure memory."""
ACCELERATOR_SAMPLES = 10
"""Minimum samples on an accelerator, where a sample costs little."""
MAX_SAMPLES = 100
"""More samples would only narrow the interval within one process, which is not the relevant one."""
TREND_LEVEL = 0.05
"""Significance level of the trend test; one stationary series in twenty loses a few samples."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Times of one function, in order, after the warm-up."""

    seconds: list[float]
    end: Literal["precise", "budget"]
    """Why sampling ended: the interval was narrow enough, or the time or `MAX_SAMPLES` was used up."""
    runs: int
    """Total number of runs, including the warm-up and dropped samples."""

    @property
    def median(self) -> float:
        """Median of the samples, in seconds."""
        return statistics.median(self.seconds)

    @property
    def half_width(self) -> float | None:
        """Half-width of the 95 % interval of the median, relative to the median;
        None without such an interval."""
        width = half_width(self.seconds)
        return width if math.isfinite(width) else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all submitted work; on the CPU this is always the case."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def sample(
    work: Callable[[], object],
    device: torch.device,
    *,
    seconds: float,
    at_least: int,
    precision: float,
) -> Samples:
    """Time runs of `work` until the half-width of the median's interval is below `precision` and there is no
    trend, or until `seconds` or `MAX_SAMPLES` runs are used; at least `at_least` samples are taken, and at
    least `ACCELERATOR_SAMPLES` on an accelerator.

    Warm-up runs count towards `seconds`: a trend reduces the number of samples but does not extend the time.
    """
    on_host = device.type == "cpu"
    warm_up = WARM_UP if on_host else ACCELERATOR_WARM_UP
    at_least = at_least if on_host else max(at_least, ACCELERATOR_SAMPLES)
    for _ in range(warm_up):
        work()
    synchronize(device)
    taken: list[float] = []
    runs, begun = 0, time.perf_counter()

    def precise() -> bool:
        return len(taken) >= at_least and half_width(taken) < precision

    while True:
        start = time.perf_counter()
        work()
        synchronize(device)
        end = time.perf_counter()
        taken.append(end - start)
        runs += 1
        spent = runs >= at_least and (runs >= MAX_SAMPLES or end - begun >= seconds)
        if spent or precise():
            taken = drop_warm_up(taken, at_least)
            if precise():
                return Samples(seconds=taken, end="precise", runs=warm_up + runs)
            if spent:
                return Samples(seconds=taken, end="budget", runs=warm_up + runs)


def drop_warm_up(samples: Sequence[float], at_least: int) -> list[float]:
    """Return the samples after the warm-up, at least `at_least` of them. The first sample is dropped while
    the samples have a decreasing trend, by a one-sided test of Kendall's rank correlation with their order
    (Mann 1945, doi:10.2307/1907187)."""
    first = 0
    while len(samples) - first > at_least and _has_falling_trend(samples[first:]):
        first += 1
    return list(samples[first:])


def _has_falling_trend(samples: Sequence[float]) -> bool:
    return bool(kendalltau(range(len(samples)), samples, alternative="less").pvalue < TREND_LEVEL)


def half_width(samples: Sequence[float]) -> float:
    """Return half the width of the median's `interval`, relative to the median; infinity if there is none."""
    ends = interval(samples)
    return (ends[1] - ends[0]) / (2 * statistics.median(samples)) if ends else math.inf


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the median. Its ends are order statistics, which requires no assumption
    about the distribution (Conover, *Practical Nonparametric Statistics*, section 3.2). None for fewer than
    six samples, because even their range covers the median with less than 95 % probability."""
    rank = _rank_of_end(len(samples))
    ordered = sorted(samples)
    return (ordered[rank - 1], ordered[-rank]) if rank else None


@cache
def _rank_of_end(count: int) -> int:
    """Return the largest k such that the k-th lowest and the k-th highest of `count` samples enclose the
    median with a probability of at least `CONFIDENCE`; 0 if there is none."""
    return int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))
