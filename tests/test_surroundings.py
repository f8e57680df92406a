"""Whether other work on the machine is seen: in figures recorded with and without it, and live."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.measure import contention, nvml
from bench.measure.contention import Contention, ContentionMonitor
from bench.measure.nvml import DeviceState
from bench.records import KEYS

CPU = torch.device("cpu")
BUSY = "while True: pass"


@contextmanager
def foreign(*, core: int | None = None, count: int = 1) -> Iterator[None]:
    """Processes that do nothing but keep cores busy, or one core."""
    pin = "" if core is None else f"import os; os.sched_setaffinity(0, {{{core}}})\n"
    script = f"{pin}print(flush=True)\n{BUSY}"
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it is busy from here on
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This thread alone on one core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def work(seconds: float) -> None:
    """Keep a core busy until that much time has passed."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def seen(
    wait_share: float | None = 0.0, foreign_cores: float | None = 0.0, cpu_share: float = 0.95, **device: Any
) -> Contention:
    return Contention(
        load_before=2.0,
        load_after=2.0,
        cpu_share=cpu_share,
        wait_share=wait_share,
        foreign_cores=foreign_cores,
        device=DeviceState(**device),
    )


# --- live ----------------------------------------------------------------------------------------


def test_a_core_shared_with_another_process_contaminates() -> None:
    core = min(os.sched_getaffinity(0))
    with foreign(core=core), on_core(core):
        window = ContentionMonitor(CPU)
        work(0.4)
        found = window.end()
    assert found["wait_share"] > 0.2
    assert found["foreign_cores"] > 0.2
    assert "had no core" in found["contaminated"]


def test_the_cores_that_others_keep_busy_are_counted() -> None:
    """More of them only where other tests run beside this one."""
    with foreign():
        window = ContentionMonitor(CPU)
        time.sleep(0.4)
        found = window.end()
    assert 0.4 < found["foreign_cores"] <= len(os.sched_getaffinity(0)) + 0.1
    assert found["cpu_share"] < 0.2
    assert found["wait_share"] < 0.2


@pytest.mark.parametrize(("seconds", "told"), [(0.001, None), (0.079, None), (0.1, 0.2), (2.0, 0.01)])
def test_a_window_shorter_than_its_ticks_does_not_count_them(seconds: float, told: float | None) -> None:
    """One tick of 10 ms within 1 ms would read as ten cores that others keep busy."""
    begun, ended = contention.Counters(), contention.Counters()
    ended.clock, ended.used = begun.clock + seconds, begun.used
    begun.busy, ended.busy = 100.0, 100.02
    found = contention.foreign_cores(begun, ended)
    assert found == (None if told is None else pytest.approx(told))


def test_what_the_driver_knows_is_named_before_what_is_estimated() -> None:
    reason = seen(wait_share=0.9, foreign_cores=24.3, gpu_throttling="heat").contaminated(threads=1, cores=2)
    assert reason == "the device was throttled: heat"


def test_the_time_this_process_uses_is_its_own() -> None:
    begun, used = contention.busy_seconds(), time.process_time()
    window = ContentionMonitor(CPU)
    work(0.3)
    found = window.end()
    ended = contention.busy_seconds()
    assert begun is not None
    assert ended is not None
    own = time.process_time() - used
    assert ended - begun > own - 0.05
    assert found["cpu_share"] * torch.get_num_threads() == pytest.approx(own / 0.3, rel=0.1)


def test_a_window_fills_the_record_s_keys() -> None:
    found = ContentionMonitor(CPU).end()
    assert set(found) <= set(KEYS)
    assert {key for key in found if key.startswith("gpu_")} >= {"gpu_clock_mhz", "gpu_foreign_processes"}
    assert all(found[key] is None for key in found if key.startswith("gpu_"))


@pytest.mark.slow
def test_a_planted_load_marks_its_cells_and_they_alone_are_run_again(tmp_path: Path) -> None:
    """A foreign process a core while the second of two sweeps runs; then a third, that measures again."""

    def sweep(replicate: int, *more: str) -> dict[int, dict[str, Any]]:
        cells = [f"replicate=range({replicate + 1})", "data=stdlib", "measure=quick", "seq_len=512"]
        done = subprocess.run(
            [sys.executable, "-m", "bench", "-m", *cells, "measure.time_seconds=0.3", *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        paths = (tmp_path / "results/adhoc/records").glob("*.json")
        found = [json.loads(path.read_text()) for path in paths]
        told = sum(record["contaminated"] is not None for record in found)
        assert (f"{told} of {len(found)} cells are contaminated" in done.stderr) == (told > 0)
        return {record["replicate"]: record for record in found}

    sweep(0)
    with foreign(count=len(os.sched_getaffinity(0))):
        loaded = sweep(1)
    assert loaded[1]["contaminated"]
    again = sweep(1, "rerun=contaminated")
    for replicate, record in loaded.items():
        measured = again[replicate]["started_at"] != record["started_at"]
        assert measured == (record["contaminated"] is not None)


# --- the rule, on recorded figures ----------------------------------------------------------------

# (wait_share, foreign_cores) in windows of 0.1 to 0.4 s of training steps at 512 tokens, on two cores: beside
# processes of the lowest weight, which cost a step 5 to 25 %, and beside one and two that kept a core busy.
TWO_THREADS = {
    "the lowest weight": [
        *((0.0612, 0.125), (0.0441, 0.061), (0.0433, 0.143), (0.0443, 0.112)),
        *((0.0696, 0.177), (0.0364, 0.101), (0.0414, 0.044), (0.0460, 0.158)),
    ],
    "one": [(0.4042, 0.875), (0.3049, 0.685), (0.2829, 0.665), (0.3643, 0.825), (0.4051, 0.854)],
    "two": [(0.5205, 1.115), (0.5071, 1.074), (0.5088, 1.098), (0.5003, 1.065), (0.5343, 1.164)],
}
ONE_THREAD = {
    "one": [(0.0009, 1.043), (0.0003, 0.953), (0.0027, 1.044)],
    "three": [(0.3369, 1.320), (0.3413, 1.359)],
}


@pytest.mark.parametrize("figures", sum(TWO_THREADS.values(), ONE_THREAD["three"]))
def test_waiting_for_a_core_contaminates(figures: tuple[float, float]) -> None:
    reason = seen(*figures).contaminated(threads=2, cores=2)
    assert reason is not None
    assert f"no core {figures[0]:.0%} of the time" in reason


@pytest.mark.parametrize("figures", ONE_THREAD["one"])
def test_a_process_on_another_core_does_not(figures: tuple[float, float]) -> None:
    """The step took no longer beside it; two threads would have."""
    assert seen(*figures).contaminated(threads=1, cores=2) is None
    assert seen(*figures).contaminated(threads=2, cores=2) is not None


@pytest.mark.parametrize("figures", TWO_THREADS["one"] + TWO_THREADS["two"])
def test_busy_cores_contaminate_where_waiting_is_not_told(figures: tuple[float, float]) -> None:
    reason = seen(None, figures[1]).contaminated(threads=2, cores=2)
    assert reason is not None
    assert "of 2 cores busy" in reason


def test_a_wide_machine_has_room_for_others() -> None:
    assert seen(foreign_cores=40.0).contaminated(threads=16, cores=64) is None
    reason = seen(foreign_cores=60.0).contaminated(threads=16, cores=64)
    assert reason == "others kept 60.0 of 64 cores busy; the cell has 16 threads"


def test_where_the_system_says_nothing_nothing_is_concluded() -> None:
    assert seen(None, None, cpu_share=0.2).contaminated(threads=2, cores=2) is None


# --- the driver of a device -----------------------------------------------------------------------


def test_a_device_of_no_driver_says_nothing() -> None:
    assert nvml.read(CPU) == nvml.UNKNOWN_STATE


def test_the_names_of_reasons_are_the_driver_s() -> None:
    pynvml = pytest.importorskip("pynvml")
    bits = [getattr(pynvml, f"nvmlClocksEventReason{name}") for name in nvml.REASONS]
    assert len({*bits}) == len(bits)
    assert sum(bits) & pynvml.nvmlClocksEventReasonGpuIdle == 0


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ({}, None),
        ({"gpu_throttling": "none", "gpu_foreign_processes": 0}, None),
        ({"gpu_throttling": "power cap"}, None),
        ({"gpu_throttling": "heat"}, "heat"),
        ({"gpu_throttling": "power cap, hardware slowdown"}, "hardware slowdown"),
        ({"gpu_foreign_processes": 1}, "1 other process on"),
        ({"gpu_foreign_processes": 3}, "3 other processes on"),
    ],
)
def test_a_device_that_is_slowed_down_or_shared_contaminates(
    device: dict[str, Any], reason: str | None
) -> None:
    told = seen(**device).contaminated(threads=1, cores=8)
    assert told is None if reason is None else told is not None and reason in told


def test_either_end_of_the_window_spoils_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = DeviceState(gpu_throttling="heat", gpu_foreign_processes=2, gpu_clock_mhz=900)
    fine = DeviceState(gpu_throttling="none", gpu_foreign_processes=0, gpu_clock_mhz=1980)
    for states in ([spoilt, fine], [fine, spoilt]):
        monkeypatch.setattr(nvml, "read", lambda _, states=states: states.pop(0))
        last = states[-1].gpu_clock_mhz
        found = ContentionMonitor(CPU).end()
        assert found["gpu_clock_mhz"] == last
        assert (found["gpu_throttling"], found["gpu_foreign_processes"]) == ("heat", 2)
        assert found["contaminated"]
