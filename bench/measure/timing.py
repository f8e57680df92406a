"""Wall-clock samples of a piece of work, with the device waited for.

Samples are taken until the 95 % interval of their median is narrow or the budget is spent, and those
from before the times stopped falling are dropped. The harness never concludes from the samples of one
process: two processes differ by more than either one's spread, so spread comes from replicates.
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

WARM_UP = 1
"""Untimed runs before sampling. The step before them was already run for FLOPs and for memory."""
MOST_SAMPLES = 100
"""More would narrow the interval of one process, which is not the one that matters."""
FALLING = 0.05
"""Level of the test that finds a trend; one stationary series in twenty loses a few samples to it."""
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What one piece of work took, run after run, once warm."""

    seconds: list[float]
    end: Literal["precise", "budget"]
    """Why sampling ended: the interval was narrow, or the time or `MOST_SAMPLES` runs were spent."""
    runs: int
    """How often the work was done in all, the warm-up and samples that were dropped included."""

    @property
    def median(self) -> float:
        """The middle sample, in seconds."""
        return statistics.median(self.seconds)

    @property
    def half_width(self) -> float | None:
        """Of the 95 % interval of the median, relative to it; None where it has no such interval."""
        width = half_width(self.seconds)
        return width if math.isfinite(width) else None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; the CPU is always done."""
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
    """Time runs of `work` until the half-width of the median's interval is below `precision` with no trend
    left, or `seconds` or `MOST_SAMPLES` runs are spent; `at_least` samples in any case.

    Runs of the warm-up count towards `seconds`: a trend costs samples and no time.
    """
    for _ in range(WARM_UP):
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
        spent = runs >= at_least and (runs >= MOST_SAMPLES or end - begun >= seconds)
        if spent or precise():
            taken = warm(taken, at_least)
            if precise():
                return Samples(seconds=taken, end="precise", runs=WARM_UP + runs)
            if spent:
                return Samples(seconds=taken, end="budget", runs=WARM_UP + runs)


def warm(samples: Sequence[float], at_least: int) -> list[float]:
    """The samples from the warm-up's end on, `at_least` of them: the first one is dropped for as long as
    the rest fall with time, by a one-sided test of Kendall's rank correlation with their order (Mann 1945,
    doi:10.2307/1907187)."""
    first = 0
    while len(samples) - first > at_least and _falls(samples[first:]):
        first += 1
    return list(samples[first:])


def _falls(samples: Sequence[float]) -> bool:
    return bool(kendalltau(range(len(samples)), samples, alternative="less").pvalue < FALLING)


def half_width(samples: Sequence[float]) -> float:
    """Half the width of the median's `interval`, relative to the median; infinite where there is none."""
    ends = interval(samples)
    return (ends[1] - ends[0]) / (2 * statistics.median(samples)) if ends else math.inf


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the median; None for fewer than six samples, whose extremes do not hold it as
    often as that. Its ends are order statistics, which takes no distribution for granted (Conover,
    *Practical Nonparametric Statistics*, section 3.2)."""
    beyond = _beyond(len(samples))
    ordered = sorted(samples)
    return (ordered[beyond - 1], ordered[-beyond]) if beyond else None


@cache
def _beyond(count: int) -> int:
    """k, such that the k-th lowest and the k-th highest of `count` samples have the median between them as
    often as `CONFIDENCE` or more; 0 for none."""
    return int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))
