"""How many samples are taken; never how long one takes."""

from __future__ import annotations

import time
from statistics import median as middle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.measure.timing import MOST_SAMPLES, WARM_UP, median, sample

CPU = torch.device("cpu")


class Work:
    """Counts its calls; each may take a while."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls, self.seconds = 0, seconds

    def __call__(self) -> None:
        self.calls += 1
        time.sleep(self.seconds)


@pytest.mark.parametrize("at_least", [1, 3, 17])
def test_no_budget_takes_the_fewest_samples(at_least: int) -> None:
    work = Work()
    assert len(sample(work, CPU, seconds=0, at_least=at_least)) == at_least
    assert work.calls == at_least + WARM_UP, "a run that was warm-up is not sampled"


def test_no_budget_buys_more_than_the_most_samples() -> None:
    work = Work()
    assert len(sample(work, CPU, seconds=5, at_least=3)) == MOST_SAMPLES
    assert work.calls == MOST_SAMPLES + WARM_UP


def test_the_fewest_samples_are_taken_even_where_they_are_more_than_the_most() -> None:
    assert len(sample(Work(), CPU, seconds=5, at_least=MOST_SAMPLES + 5)) == MOST_SAMPLES + 5


def test_the_fewest_samples_are_taken_even_where_one_spends_the_budget() -> None:
    assert len(sample(Work(0.01), CPU, seconds=0.001, at_least=4)) == 4


def test_sampling_ends_with_the_budget() -> None:
    """All samples but the last began within it; the work sleeps, so no sample is shorter than that."""
    budget, nap = 0.1, 0.01
    samples = sample(Work(nap), CPU, seconds=budget, at_least=1)
    assert all(one >= nap for one in samples)
    assert sum(samples[:-1]) < budget
    assert 1 <= len(samples) <= budget / nap + 1


def test_a_sample_is_one_run() -> None:
    """What is slow once is slow in one sample alone."""

    def work() -> None:
        nonlocal runs
        runs += 1
        time.sleep(0.05 if runs == 3 else 0.0)

    runs = 0
    samples = sample(work, CPU, seconds=0, at_least=5)
    slowest = samples.index(max(samples))
    assert slowest == 3 - WARM_UP - 1
    assert samples[slowest] >= 0.05


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_median_has_half_of_the_samples_on_each_side(samples: list[float]) -> None:
    found = median(samples)
    assert found == middle(samples)
    assert sum(one <= found for one in samples) * 2 >= len(samples)
    assert sum(one >= found for one in samples) * 2 >= len(samples)
