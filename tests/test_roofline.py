"""The machine's roofline: a bound that is taken once, raised where it proves too low, and never passed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from bench.config.parse import parse
from bench.config.spec import Cell
from bench.measure import roofline
from bench.measure.roofline import AboveRoofline, Peaks, Roofline
from bench.run import isolate, memory_limit

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine whose peak rate is, each time it is taken, the next of a list; the last repeats."""
    rates = [100.0]

    def take(device: torch.device, dtype: torch.dtype) -> Peaks:
        torch.rand(3)  # as measuring does
        rate = rates.pop(0) if len(rates) > 1 else rates[0]
        return Peaks(peak_flops_per_second=rate, peak_bytes_per_second=1000.0 / rate)

    monkeypatch.setattr(roofline, "measure", take)
    return rates


def of(folder: Path, name: str = "a CPU", dtype: str = "float32") -> Roofline:
    return Roofline(folder, CPU, name, dtype)


def test_every_cell_of_a_run_divides_by_the_same(tmp_path: Path, machine: list[float]) -> None:
    machine[:] = [100.0, 200.0]
    first, second = of(tmp_path), of(tmp_path)
    assert first.peaks == second.peaks
    assert second.utilisation(50, 1.0) == 0.5


def test_another_machine_type_or_number_of_threads_is_measured_anew(
    tmp_path: Path, machine: list[float]
) -> None:
    machine[:] = [1.0, 2.0, 3.0, 4.0]
    threads = torch.get_num_threads()
    found = [of(tmp_path), of(tmp_path, name="another"), of(tmp_path, dtype="bfloat16")]
    torch.set_num_threads(threads + 1)
    try:
        found.append(of(tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert [each.peaks.peak_flops_per_second for each in found] == [1.0, 2.0, 3.0, 4.0]
    assert of(tmp_path).peaks == found[0].peaks


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peak_flops_per_second": 1}'])
def test_a_damaged_file_is_taken_again(tmp_path: Path, machine: list[float], content: str) -> None:
    of(tmp_path)
    (path,) = (tmp_path / "roofline").iterdir()
    path.write_text(content)
    assert of(tmp_path).peaks.peak_flops_per_second == 100.0
    assert json.loads(path.read_text())["peak_flops_per_second"] == 100.0


def test_a_peak_taken_on_a_slow_moment_is_raised_and_kept(tmp_path: Path, machine: list[float]) -> None:
    """The better of each: the copies of the first time were the quicker ones."""
    machine[:] = [40.0, 50.0, 80.0]
    found = of(tmp_path)
    assert found.utilisation(60, 1.0) == 60 / 80
    assert found.peaks == Peaks(peak_flops_per_second=80.0, peak_bytes_per_second=1000.0 / 40)
    assert of(tmp_path).peaks == found.peaks, "the cells after it divide by it too"


def test_the_peak_itself_is_no_error_and_nothing_is_taken_again(tmp_path: Path, machine: list[float]) -> None:
    machine[:] = [100.0, 500.0]
    assert of(tmp_path).utilisation(200, 2.0) == 1.0


@pytest.mark.parametrize("flops", [101, 10**6])
def test_above_the_peak_is_an_error_that_has_the_figures(
    tmp_path: Path, machine: list[float], flops: int
) -> None:
    with pytest.raises(AboveRoofline, match=r"^roofline: .* 100 FLOPs per second .*$") as failure:
        of(tmp_path).utilisation(flops, 1.0)
    assert f"{flops:.4g} FLOPs in 1 s" in str(failure.value)
    assert f"{flops / 100:.1%}" in str(failure.value)


def test_the_callers_random_state_is_left_alone(tmp_path: Path, machine: list[float]) -> None:
    machine[:] = [1.0, 2.0]
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    of(tmp_path).utilisation(2, 1.0)
    assert torch.equal(torch.rand(3), want)


# --- how it is taken ------------------------------------------------------------------------------


def timed(seconds: Callable[[int], float], seen: list[int]) -> Callable[..., float]:
    """Stands in for the clock: a product of n rows takes seconds(n)."""

    def fastest(work: Any, device: torch.device) -> float:
        seen.append(len(work.args[0]))
        return seconds(seen[-1])

    return fastest


def test_the_best_size_counts_and_none_after_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIZES", (2, 4, 8, 16))
    seen: list[int] = []
    seconds = {2: 1e-3, 4: 2e-3, 8: 1.0}
    monkeypatch.setattr(roofline, "fastest", timed(seconds.__getitem__, seen))
    assert roofline.product_rate(CPU, torch.float32) == pytest.approx(2 * 4**3 / 2e-3)
    assert seen == [2, 4, 8]


@pytest.mark.parametrize(("rates", "peak"), [((3.0, 9.0), 9.0), ((9.0, 3.0), 9.0)])
def test_what_autocast_leaves_in_float32_is_bounded_too(
    monkeypatch: pytest.MonkeyPatch, rates: tuple[float, float], peak: float
) -> None:
    """On a CPU without bfloat16 units its products are the slower ones."""
    known = dict(zip((torch.bfloat16, torch.float32), rates, strict=True))
    monkeypatch.setattr(roofline, "product_rate", lambda device, dtype: known[dtype])
    monkeypatch.setattr(roofline, "copy_rate", lambda device: 1.0)
    assert roofline.measure(CPU, torch.bfloat16).peak_flops_per_second == peak
    assert roofline.measure(CPU, torch.float32).peak_flops_per_second == known[torch.float32]


def test_the_fastest_of_several_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: runs of 5, 2, 9, 4 and 7 seconds after one that is not looked at."""
    lasts = iter([100.0, 5.0, 2.0, 9.0, 4.0, 7.0])
    now = 0.0

    def work() -> None:
        nonlocal now
        now += next(lasts)

    monkeypatch.setattr(roofline.time, "perf_counter", lambda: now)
    assert roofline.fastest(work, CPU) == 2.0
    assert next(lasts, None) is None, "all of them ran"


def test_a_real_machine_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "SIZES", (64, 128))
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    found = roofline.measure(CPU, torch.bfloat16)
    assert min(dataclasses.astuple(found)) > 0


# --- in a cell ------------------------------------------------------------------------------------


class Told(dict[str, Any]):
    """Stands in for the pipe to a cell's parent."""

    def send(self, figures: dict[str, Any]) -> None:
        self.update(figures)


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[Cell]:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    overrides = ["variant=dense", "data=files", f"data.path={corpus}", f"results_dir={tmp_path}"]
    overrides += ["seq_len=24", "depth=1", "model.d_model=16", "device=cpu", "measure=quick"]
    overrides += ["measure.time_seconds=0", "measure.min_samples=2"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield parse(compose("config", overrides=overrides))


def ran(cell: Cell) -> Told:
    told = Told()
    told |= isolate._outcome(cell, "cell", "code", memory_limit.memory_bytes(cell.spec), told)  # type: ignore[arg-type]
    return told


def test_a_cell_has_its_utilisation(cell: Cell, machine: list[float]) -> None:
    machine[:] = [1e15]
    told = ran(cell)
    assert told["status"] == "ok", told["reason"]
    rate = told["flops_algorithmic_step"] / told["step_seconds_median"]
    assert told["mfu"] == pytest.approx(rate / 1e15)
    assert (told["peak_flops_per_second"], told["peak_bytes_per_second"]) == (1e15, 1e-12)


def test_a_cell_above_the_roofline_is_an_error_with_its_times_told(cell: Cell, machine: list[float]) -> None:
    machine[:] = [1.0, 2.0]
    told = ran(cell)
    assert told["status"] == "error"
    assert told["reason"].startswith("roofline: ")
    assert told["peak_flops_per_second"] == 2.0, "the best of what was seen"
    assert told["step_seconds_median"] > 0
    assert "mfu" not in told


def test_a_cell_says_what_is_claimed_of_it(cell: Cell, machine: list[float]) -> None:
    machine[:] = [1e15]
    told = ran(cell)
    assert (told["claimed_time_exponent"], told["survey_exponent"]) == (2, None)
    assert "Vaswani" in told["claim_source"]
    assert told["claimed_depth_exponent"] == 1
