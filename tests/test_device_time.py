"""Device time of a step: the union of the kernels' intervals; and the host's time for a launch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import device_time, timing
from bench.measure.device_time import busy_seconds, covered, is_launch_bound, launch_seconds

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=12))
def test_overlapping_intervals_are_counted_once(intervals: list[tuple[int, int]]) -> None:
    seconds = {second for start, length in intervals for second in range(start, start + length)}
    assert covered((start, start + length) for start, length in intervals) == len(seconds)


def test_a_cpu_has_no_device_time(tmp_path: Path) -> None:
    ran = []
    assert busy_seconds(lambda: ran.append(1), CPU) is None
    assert not ran
    assert launch_seconds(tmp_path, CPU, "chip") is None
    assert not list(tmp_path.iterdir())


def test_a_step_is_launch_bound_if_its_device_is_often_idle() -> None:
    assert is_launch_bound(None, 1.0) is None
    assert is_launch_bound(0.5, 1.0) is True
    assert is_launch_bound(0.95, 1.0) is False


def test_the_time_of_a_launch_is_that_of_one_operation() -> None:
    """The chain runs on any device; on a CPU it contains the computation too, so it is an upper bound."""
    seconds = device_time._launch_seconds(CPU)
    assert math.isfinite(seconds)
    assert seconds > 0


def test_an_accelerator_gets_more_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    for device, least, warm_up in ((CPU, 3, 1), (CUDA, 10, 3)):
        taken = timing.sample(lambda: None, device, seconds=0, at_least=3, precision=0)
        assert taken.runs == least + warm_up
        assert taken.end == "budget"


@pytest.mark.cuda
def test_the_device_is_busy_for_one_large_product_and_idle_for_many_small_ones(tmp_path: Path) -> None:
    large, small = torch.ones(8192, 8192, device=CUDA), torch.ones(16, device=CUDA)

    def many() -> None:
        for _ in range(1000):
            small.sin()

    for work, bound in ((lambda: large @ large, False), (many, True)):
        wall = timing.sample(work, CUDA, seconds=0.2, at_least=10, precision=0).median
        busy = busy_seconds(work, CUDA)
        assert busy is not None
        assert 0 < busy <= 1.2 * wall
        assert is_launch_bound(busy, wall) is bound
    assert 1e-6 < launch_seconds(tmp_path, CUDA, "card") < 1e-3  # type: ignore[operator]
