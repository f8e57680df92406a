"""How many samples are taken, which are kept and what is said of them; never how long one takes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import chain, repeat
from statistics import median as middle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import quantile_test

from bench.measure import timing
from bench.measure.timing import MAX_SAMPLES, WARM_UP, Samples, drop_warm_up, half_width, interval, sample

CPU = torch.device("cpu")


class Work:
    """Counts its calls; each may take a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self) -> None:
        self.calls += 1
        time.sleep(self.seconds)


class Played:
    """A clock that only work moves, each run by the next of the given durations."""

    def __init__(self, durations: Iterator[float]) -> None:
        self.durations, self.now, self.runs = durations, 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def __call__(self) -> None:
        self.now += next(self.durations)
        self.runs += 1


def play(
    durations: Iterator[float], *, seconds: float, at_least: int = 3, precision: float = 0.03
) -> tuple[Samples, Played]:
    """What is sampled of work whose runs take these times, the warm-up's first."""
    clock = Played(durations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", clock)
        return sample(clock, CPU, seconds=seconds, at_least=at_least, precision=precision), clock


def noisy(around: float, spread: float, seed: int = 0) -> Iterator[float]:
    random = np.random.default_rng(seed)
    while True:
        yield around * math.exp(random.normal(0, spread))


# --- how many ------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_least", [1, 3, 17])
def test_no_budget_takes_the_fewest_samples(at_least: int) -> None:
    work = Work()
    taken = sample(work, CPU, seconds=0, at_least=at_least, precision=0)
    assert (len(taken.seconds), taken.end) == (at_least, "budget")
    assert work.calls == at_least + WARM_UP, "a run that was warm-up is not sampled"


def test_no_budget_buys_more_than_the_most_samples() -> None:
    taken, played = play(noisy(1e-3, 0.1), seconds=5, precision=0)
    assert played.runs == MAX_SAMPLES + WARM_UP
    assert taken.end == "budget"


def test_the_fewest_samples_are_taken_even_where_they_are_more_than_the_most() -> None:
    taken = sample(Work(), CPU, seconds=5, at_least=MAX_SAMPLES + 5, precision=0)
    assert len(taken.seconds) == MAX_SAMPLES + 5


def test_the_fewest_samples_are_taken_even_where_one_spends_the_budget() -> None:
    assert len(sample(Work(0.01), CPU, seconds=0.001, at_least=4, precision=1).seconds) == 4


def test_sampling_ends_with_the_budget() -> None:
    """All samples but the last began within it; the work sleeps, so no sample is shorter than that."""
    budget, nap = 0.1, 0.01
    samples = sample(Work(nap), CPU, seconds=budget, at_least=1, precision=0).seconds
    assert all(one >= nap for one in samples)
    assert sum(samples[:-1]) < budget
    assert 1 <= len(samples) <= budget / nap + 1


def test_sampling_ends_where_the_interval_is_narrow_and_says_so() -> None:
    taken, played = play(noisy(0.01, 0.01), seconds=5)
    assert taken.end == "precise"
    assert taken.precision is not None
    assert taken.precision < 0.03
    assert played.runs < 20


def test_sampling_of_noise_spends_the_budget_and_says_so() -> None:
    taken, played = play(noisy(0.1, 0.5), seconds=4)
    assert taken.end == "budget"
    assert taken.precision is not None
    assert taken.precision > 0.03
    assert played.now > 4


def test_the_precision_is_checked_at_few_counts_of_samples() -> None:
    """Sampling that stopped wherever the interval is narrow would stop where it is so by chance."""
    counts = [6, 9, 14, 21, 32, 48, 72]
    ended = [play(noisy(1.0, 0.05, seed), seconds=1e9) for seed in range(200)]
    precise = [taken for taken, _ in ended if taken.end == "precise"]
    complete = {n for taken in precise if (n := len(taken.seconds)) == taken.runs - WARM_UP}
    assert complete <= {*counts}, "none was dropped as warm-up"
    assert len(complete) > 3
    covered = [ends[0] <= 1 <= ends[1] for taken in precise if (ends := interval(taken.seconds))]
    assert sum(covered) / len(covered) > 0.9


def test_fewer_samples_than_an_interval_needs_are_never_precise() -> None:
    """The cells that ended on three samples could not have reached any precision."""
    taken, _ = play(repeat(1.0), seconds=0.1, at_least=3)
    assert (len(taken.seconds), taken.end, taken.precision) == (3, "budget", None)
    taken, _ = play(repeat(1.0), seconds=0.1, at_least=6)
    assert (len(taken.seconds), taken.end, taken.precision) == (6, "precise", 0.0)


def bought(durations: list[float], seconds: float, at_least: int) -> int:
    """Runs, less the warm-up's, that the budget alone would buy."""
    runs, spent = 0, 0.0
    while runs < at_least or (runs < MAX_SAMPLES and spent < seconds):
        runs += 1
        spent += durations[min(WARM_UP + runs, len(durations)) - 1]
    return runs


@given(
    st.lists(st.integers(1, 1000).map(lambda n: n / 1024), min_size=1, max_size=30),
    st.integers(0, 2048).map(lambda n: n / 1024),
    st.integers(1, 12),
    st.sampled_from([0, 0.03, 0.3, 10]),
)
def test_neither_warm_up_nor_precision_costs_a_run(
    durations: list[float], seconds: float, at_least: int, precision: float
) -> None:
    """Never more runs than the budget alone would buy, and never fewer samples than were asked for."""
    taken, played = play(
        chain(durations, repeat(durations[-1])), seconds=seconds, at_least=at_least, precision=precision
    )
    runs = played.runs - WARM_UP
    assert at_least <= len(taken.seconds) <= runs <= bought(durations, seconds, at_least)
    if taken.end == "precise":
        assert half_width(taken.seconds) < precision
    else:
        assert runs == bought(durations, seconds, at_least)


# --- which ---------------------------------------------------------------------------------------


def test_a_sample_is_one_run() -> None:
    """What is slow once is slow in one sample alone."""

    def work() -> None:
        nonlocal runs
        runs += 1
        time.sleep(0.05 if runs == 3 else 0.0)

    runs = 0
    samples = sample(work, CPU, seconds=0, at_least=5, precision=0).seconds
    slowest = samples.index(max(samples))
    assert slowest == 3 - WARM_UP - 1
    assert samples[slowest] >= 0.05


@pytest.mark.parametrize("seed", range(20))
def test_a_warm_up_is_not_sampled(seed: int) -> None:
    """Ten runs that get faster, then steady ones: what is left of the former is nearly as fast as these."""
    falling = [0.01 * (1 + 2 * 0.7**k) for k in range(10)]
    taken, _ = play(chain([0.1], falling, noisy(0.01, 0.02, seed)), seconds=0.4)
    assert max(taken.seconds) < 0.0135 < falling[4]
    assert taken.median == pytest.approx(0.01, rel=0.03)


def test_a_trend_that_never_ends_leaves_the_last_samples() -> None:
    falling = (1 / (10 + k) for k in range(10**6))
    taken, _ = play(falling, seconds=1.0, at_least=4)
    assert taken.end == "budget"
    assert len(taken.seconds) == 4


def test_steady_work_loses_few_samples() -> None:
    lost = [
        20 - len(drop_warm_up([next(series) for _ in range(20)], 3)) for series in map(steady, range(300))
    ]
    assert sum(n > 0 for n in lost) / len(lost) < 0.1
    assert np.mean(lost) < 0.5


def steady(seed: int) -> Iterator[float]:
    return noisy(1.0, 0.2, seed)


def test_equal_samples_have_no_trend() -> None:
    assert drop_warm_up([1.0] * 9, 3) == [1.0] * 9


@given(st.lists(st.floats(1e-6, 10), min_size=1, max_size=40), st.integers(1, 10))
def test_what_is_kept_is_the_end_of_what_was_taken(samples: list[float], at_least: int) -> None:
    kept = drop_warm_up(samples, at_least)
    assert kept == samples[len(samples) - len(kept) :]
    assert len(kept) >= min(at_least, len(samples))


# --- what is said of them ------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_median_has_half_of_the_samples_on_each_side(samples: list[float]) -> None:
    found = Samples(seconds=samples, end="budget", runs=9).median
    assert found == middle(samples)
    assert sum(one <= found for one in samples) * 2 >= len(samples)
    assert sum(one >= found for one in samples) * 2 >= len(samples)


@pytest.mark.parametrize("count", [*range(1, 30), 99, 100])
def test_the_interval_is_that_of_scipy_s_quantile_test(count: int) -> None:
    samples = np.random.default_rng(count).lognormal(size=count)
    expected = quantile_test(samples, p=0.5).confidence_interval(0.95)
    found = interval([*map(float, samples)])
    if found is None:
        assert count < 6
        assert np.isnan([expected.low, expected.high]).any()
        assert Samples(seconds=[*samples], end="budget", runs=9).precision is None
    else:
        assert found == (expected.low, expected.high)
        assert half_width([*samples]) == pytest.approx((found[1] - found[0]) / 2 / middle(samples))
