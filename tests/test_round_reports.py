"""Reports during a sweep: when one is written, on one device and on several, and what a failed one does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_sweep import Sweep, known

from bench.process.signals import Interrupts, Stopped
from bench.run import reports
from bench.run.prepare import Job
from bench.run.progress import Progress
from bench.run.reports import RoundReports, build_in_child

FOLDER = Path("results/x")


def job(
    replicate: int, minutes: float | None = 60.0, *, finished: bool = False, folder: Path = FOLDER
) -> Job:
    cell = SimpleNamespace(folder=folder, report_minutes=minutes, spec=SimpleNamespace(replicate=replicate))
    return cast(Job, SimpleNamespace(cell=cell, is_due=not finished))


@dataclass
class Built:
    """A stand-in for the building of reports."""

    folders: list[Path] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, folder: Path) -> str:
        time.sleep(self.seconds)
        self.folders.append(folder)
        return "report: x"


@pytest.fixture
def interrupts() -> Any:
    with Interrupts() as made:
        yield made


def reports_of(jobs: list[Job], interrupts: Interrupts, built: Built) -> RoundReports:
    return RoundReports(jobs, Progress({}), interrupts, built)


def test_a_report_follows_the_last_cell_of_a_round(interrupts: Interrupts) -> None:
    jobs, built = [job(0), job(0), job(1), job(1)], Built()
    made = reports_of(jobs, interrupts, built)
    seen = []
    for one in jobs:
        made.ended(one)
        seen.append(len(built.folders))
    assert seen == [0, 1, 1, 2]


def test_cells_that_were_finished_before_do_not_count(interrupts: Interrupts) -> None:
    jobs, built = [job(0, finished=True), job(1, finished=True), job(1)], Built()
    made = reports_of(jobs, interrupts, built)
    made.ended(jobs[2])
    assert built.folders == [FOLDER]


def test_each_experiment_has_rounds_of_its_own(interrupts: Interrupts) -> None:
    other = Path("results/y")
    jobs, built = [job(0), job(0, folder=other), job(0, None, folder=Path("results/z"))], Built()
    made = reports_of(jobs, interrupts, built)
    for one in reversed(jobs):
        made.ended(one)
    assert built.folders == [other, FOLDER]


def test_a_long_round_has_reports_in_between(interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(reports.time, "monotonic", lambda: now[0])
    jobs, built = [job(0, minutes=8.0) for _ in range(6)], Built()
    made = reports_of(jobs, interrupts, built)
    seen = []
    for one in jobs:
        now[0] += 60 * 5
        made.ended(one)
        seen.append(len(built.folders))
    assert seen == [0, 1, 1, 2, 2, 3], "after 10, 20 and 30 minutes, the last for the end of the round"


def test_on_several_devices_a_round_ends_with_its_last_cell(interrupts: Interrupts) -> None:
    """The next round has begun on other devices by then."""
    jobs, built = [job(0), job(0), job(1), job(1)], Built(seconds=0.05)
    made = reports_of(jobs, interrupts, built)
    made.ended(jobs[0])
    made.ended(jobs[2])
    assert not built.folders
    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(made.ended, jobs[1]), pool.submit(made.ended, jobs[3])]:
            ended.result()
    assert len(built.folders) == 2


def test_one_report_is_built_at_a_time(interrupts: Interrupts) -> None:
    jobs, most = [job(n) for n in range(4)], 0
    running: list[int] = []
    lock = threading.Lock()

    def build(folder: Path) -> str:
        nonlocal most
        with lock:
            running.append(1)
            most = max(most, len(running))
        time.sleep(0.02)
        with lock:
            running.pop()
        return "report: x"

    made = RoundReports(jobs, Progress({}), interrupts, build)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(made.ended, jobs))
    assert most == 1


def test_no_report_begins_after_a_signal(interrupts: Interrupts) -> None:
    jobs, built = [job(0)], Built()
    made = reports_of(jobs, interrupts, built)
    interrupts._received = 2
    with pytest.raises(Stopped):
        made.ended(jobs[0])
    assert not built.folders


def test_a_report_that_fails_is_one_line(tmp_path: Path) -> None:
    line = build_in_child(tmp_path / "empty")
    assert line.startswith("no report: ")
    assert "\n" not in line


def test_a_report_that_hangs_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "BUILD_SECONDS", 0.01)
    assert "timed out" in build_in_child(tmp_path)


@pytest.mark.slow
def test_a_sweep_writes_a_report_after_each_round_and_goes_on(tmp_path: Path) -> None:
    """A real sweep; the folder of the report cannot be written in the first round's place of a file."""
    report = tmp_path / "results/adhoc/report"
    report.parent.mkdir(parents=True)
    report.write_text("in the way")
    sweep = Sweep(tmp_path, "measure=plan", "replicate=0,1", "report_minutes=60", stderr=-1)
    errors = sweep.end()
    assert sweep.process.returncode == 0, errors
    assert errors.count("no report: ") == 2, errors
    assert [record.status for record in known(tmp_path)] == ["ok", "ok"]
    report.unlink()
    sweep = Sweep(tmp_path, "measure=plan", "replicate=range(4)", "report_minutes=60", stderr=-1)
    errors = sweep.end()
    assert sweep.process.returncode == 0, errors
    assert [line.split(":")[0] for line in errors.splitlines() if line.startswith("after")] == [
        "after round 2",
        "after round 3",
    ]
    assert (report / "summary.md").exists()


def test_without_the_knob_a_sweep_writes_only_records(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "measure=plan", "replicate=0,1")
    sweep.end()
    assert sweep.process.returncode == 0
    assert not (tmp_path / "results/adhoc/report").exists()
