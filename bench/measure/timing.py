"""Wall-clock samples of a function, with device synchronisation.

Samples are taken until the 95 % interval of their median is narrow enough or the budget is used. Samples from
the warm-up phase, while the times still decrease, are dropped. The harness never draws conclusions from the
samples of a single process: two processes differ by more than the spread within each, so the spread is taken
over replicates.

What the interval means was simulated: 2,000 log-normal series of at most 100 samples, with a target of 3 %.

| series | checked | precise | of these: interval covers the median | median within 3 % |
|---|---|---|---|---|
| spread 3 % | after each sample | 1.00 | 0.953 | 0.988 |
| spread 3 % | as `CHECK_GROWTH` says | 1.00 | 0.948 | 0.986 |
| spread 10 % | after each sample | 0.89 | 0.904 | 0.913 |
| spread 10 % | as `CHECK_GROWTH` says | 0.53 | 0.921 | 0.950 |
| spread 5 %, correlation 0.3 | after each sample | 1.00 | 0.840 | 0.892 |
| spread 5 %, correlation 0.3 | as `CHECK_GROWTH` says | 1.00 | 0.879 | 0.923 |
| spread 5 %, correlation 0.6 | as `CHECK_GROWTH` says | 1.00 | 0.708 | 0.794 |

Consecutive samples are correlated: by about 0.2 in the reference runs on a CPU and by 0.4 to 0.7 on an H100.
The samples of a cell are too few to tell by how much, so the interval is not corrected: it is a lower bound
on the uncertainty.
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
LEAST_FOR_INTERVAL = 6
"""Even the range of fewer samples covers their median with less than 95 % probability."""
MAX_SAMPLES = 100
"""More samples would only narrow the interval within one process, which is not the relevant one."""
CHECK_GROWTH = 1.5
"""Ratio between the numbers of samples at which their interval is compared with the target. Checks after each
sample would more often end at an interval that is narrow by chance."""
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
    def precision(self) -> float | None:
        """Half-width of the 95 % interval of the median, relative to the median, to four digits after the
        point; None without such an interval."""
        width = half_width(self.seconds)
        return round(width, 4) if math.isfinite(width) else None


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

    The precision is checked when there are `at_least` samples (or six, because fewer have no interval), and
    again whenever their number has grown by `CHECK_GROWTH`. Warm-up runs count towards `seconds`: a trend
    reduces the number of samples but does not extend the time.
    """
    on_host = device.type == "cpu"
    warm_up = WARM_UP if on_host else ACCELERATOR_WARM_UP
    at_least = at_least if on_host else max(at_least, ACCELERATOR_SAMPLES)
    for _ in range(warm_up):
        work()
    synchronize(device)
    taken: list[float] = []
    runs, check, begun = 0, max(at_least, LEAST_FOR_INTERVAL), time.perf_counter()

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
        if not spent and len(taken) < check:
            continue
        check = math.ceil(CHECK_GROWTH * len(taken))
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
    `LEAST_FOR_INTERVAL` samples."""
    rank = _rank_of_end(len(samples))
    ordered = sorted(samples)
    return (ordered[rank - 1], ordered[-rank]) if rank else None


@cache
def _rank_of_end(count: int) -> int:
    """Return the largest k such that the k-th lowest and the k-th highest of `count` samples enclose the
    median with a probability of at least `CONFIDENCE`; 0 if there is none."""
    return int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))
