"""Disturbed cells: the sweep measures them again at the end of their round, within bounds, and loses nothing.

The cells are real processes of `python -m bench`. A plug-in variant sets the system's counter of waiting
times, so that other load on the machine of the tests has no influence; one slow test uses real load.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_surroundings import foreign
from test_sweep import Sweep, cell_of, known, record_of, texts

from bench.measure import contention
from bench.records import Record
from bench.run import remeasure
from bench.run.job_queue import JobQueue
from bench.run.prepare import Job
from bench.run.remeasure import LEAST_SECONDS, SHARE, Allowance

PLUGIN = """
import time
from pathlib import Path
from bench.measure import contention
from variants.attention.dense import Dense

HERE = Path(__file__).parent
contention.busy_seconds = lambda: None
contention.waited_seconds = lambda: time.perf_counter() if (HERE / "busy").exists() else 0.0


class Steady(Dense):
    def forward(self, x, ctx, state=None):
        records = len([*HERE.glob("results/adhoc/records/*.json")])
        if (HERE / f"hold{records}").exists() and type(x).__name__ != "FakeTensor":
            (HERE / "held").touch()
            time.sleep(600)
        return super().forward(x, ctx, state)
"""
CHEAP = ["variant=steady", "measure=quick", "measure.time_seconds=0.01", "measure.min_samples=6"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the plug-in, installed as any package would be."""
    (tmp_path / "steady.py").write_text(PLUGIN)
    info = tmp_path / "steady-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: steady\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[longctx_bench.variants]\nsteady = steady:Steady\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def by_cell(folder: Path) -> dict[tuple[int, int], Record]:
    return {(record.replicate, record.twin): record for record in known(folder)}


# --- sweeps ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_disturbed_cells_are_measured_again_at_the_end_of_their_round(folder: Path) -> None:
    """The load ends while the second cell of four runs."""
    (folder / "busy").touch()
    sweep = Sweep(folder, *CHEAP, "replicate=0,1", "twin=0,1", stderr=subprocess.PIPE)
    wait_until(lambda: texts(folder))
    first = by_cell(folder)[0, 0]
    (folder / "busy").unlink()
    said = sweep.end()
    assert sweep.process.returncode == 0, said
    assert first.contaminated
    found = by_cell(folder)
    assert [record.contaminated for record in found.values()] == [None] * 4
    attempts = Counter(key for key, record in found.items() if record.attempts == 2)
    assert (0, 0) in attempts
    assert not {(1, 0), (1, 1)} & {*attempts}
    assert "again: ok          steady T=16" in said
    assert said.count("again: ") == len(attempts)
    assert "are contaminated" not in said
    order = sorted(found, key=lambda key: str(found[key].started_at))
    assert order.index((0, 0)) == 1 if len(attempts) == 1 else order[:2] == [(0, 0), (0, 1)]
    assert order[2:] == [(1, 0), (1, 1)], "the repetitions are part of their round"
    assert found[0, 0].step_seconds_samples != first.step_seconds_samples
    assert (found[0, 0].seconds_total or 0) > (first.seconds_total or 0)


@pytest.mark.parametrize("kill", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_repetition_that_is_killed_leaves_the_first_record_and_is_resumed(
    kill: signal.Signals, folder: Path
) -> None:
    """A trained cell: its quality is that of the first measurement, and its curve is not written again."""
    line = [*CHEAP, "twin=0,1", "measure.train_tokens=64", "measure.eval_tokens=64"]
    (folder / "busy").touch()
    (folder / "hold2").touch()
    sweep = Sweep(folder, *line, stderr=subprocess.PIPE)
    wait_until((folder / "held").exists)
    before, first = texts(folder), by_cell(folder)
    assert {record.attempts for record in first.values()} == {1}
    assert all(record.contaminated for record in first.values())
    curves = {path: path.stat().st_mtime_ns for path in folder.glob("results/adhoc/curves/*")}
    assert len(curves) == 2
    sweep.process.send_signal(kill)
    sweep.end()
    assert sweep.process.returncode == (-kill if kill == signal.SIGKILL else 128 + kill)
    assert texts(folder) == before
    (folder / "hold2").unlink()
    (folder / "busy").unlink()
    resumed = Sweep(folder, *line, stderr=subprocess.PIPE)
    said = resumed.end()
    assert resumed.process.returncode == 0, said
    found = by_cell(folder)
    for key, record in found.items():
        assert (record.status, record.contaminated, record.attempts) == ("ok", None, 2)
        assert record.nll == first[key].nll is not None
        assert record.tokens_trained == first[key].tokens_trained
        assert record.step_seconds_samples != first[key].step_seconds_samples
        assert str(record.started_at) > str(first[key].ended_at)
    assert {path: path.stat().st_mtime_ns for path in curves} == curves


@pytest.mark.slow
def test_a_cell_is_repeated_once_and_not_without_the_knob(folder: Path) -> None:
    (folder / "busy").touch()
    for knob, attempts in (("remeasure=false", 1), ("remeasure=true", 2), ("remeasure=true", 2)):
        sweep = Sweep(folder, *CHEAP, knob, stderr=subprocess.PIPE)
        said = sweep.end()
        assert sweep.process.returncode == 0, said
        (record,) = known(folder)
        assert record.attempts == attempts
        assert record.contaminated
        assert "1 of 1 cells are contaminated" in said


@pytest.mark.slow
def test_cells_beside_a_busy_process_are_measured_again_after_it(tmp_path: Path) -> None:
    """Real load on the only core of the sweep, until two of its cells are finished."""
    begun = contention.Counters()
    time.sleep(1)
    if (contention.foreign_cores(begun, contention.Counters()) or 0) > 0.2:
        pytest.skip("needs a machine without other load, which would disturb every cell")
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    line = ["measure=quick", "measure.time_seconds=0.2", "twin=range(5)", "seq_len=128"]
    with foreign(core=core, count=3):
        os.sched_setaffinity(0, {core})
        try:
            sweep = Sweep(tmp_path, *line, stderr=subprocess.PIPE)
        finally:
            os.sched_setaffinity(0, before)
        wait_until(lambda: len(texts(tmp_path)) >= 2)
        disturbed = by_cell(tmp_path)
    said = sweep.end()
    assert sweep.process.returncode == 0, said
    assert all(record.contaminated for record in disturbed.values())
    found = by_cell(tmp_path)
    assert len(found) == 5
    for key, first in disturbed.items():
        assert (found[key].attempts, found[key].contaminated) == (2, None)
        assert remeasure.disturbance(vars(found[key])) < remeasure.disturbance(vars(first))
        assert (found[key].step_seconds_median or 0) < (first.step_seconds_median or 0)


# --- rules ----------------------------------------------------------------------------------------


def record(**changed: Any) -> Record:
    kept = {"status": "ok", "attempts": 1, "seconds_total": 5.0, "seconds_work": 4.0, "wait_share": 0.5}
    return record_of(cell_of(), **(kept | {"contaminated": "yes", "foreign_cores": 1.0} | changed))


SECOND = {"status": "ok", "reason": None, "contaminated": "yes", "wait_share": 0.5, "foreign_cores": 1.0}


@pytest.mark.parametrize(
    ("second", "replaces"),
    [
        ({"contaminated": None}, True),
        ({"contaminated": None, "wait_share": None, "foreign_cores": None}, True),
        ({"wait_share": 0.4}, True),
        ({"wait_share": 0.5, "foreign_cores": 0.9}, True),
        ({}, False),
        ({"wait_share": 0.6, "foreign_cores": 0.1}, False),
        ({"status": "error", "reason": "x", "contaminated": None, "wait_share": 0.0}, False),
        ({"status": "timeout", "reason": "late"}, False),
    ],
)
def test_the_less_disturbed_measurement_is_kept(second: dict[str, Any], replaces: bool) -> None:
    first = record(step_seconds_median=2.0, nll=1.5)
    figures = SECOND | {"step_seconds_median": 1.0, "seconds_total": 2.0, "seconds_work": 1.0} | second
    kept, _ = remeasure.better(first, figures)
    assert kept.step_seconds_median == (1.0 if replaces else 2.0)
    assert kept.status == "ok"
    assert (kept.nll, kept.attempts, kept.seconds_total, kept.seconds_work) == (1.5, 2, 7.0, 5.0)
    if not replaces:
        same = {"attempts", "seconds_total", "seconds_work", "sequence"}
        assert {k: v for k, v in vars(kept).items() if k not in same} == {
            k: v for k, v in vars(first).items() if k not in same
        }


def test_a_failure_before_anything_was_timed_keeps_the_first() -> None:
    kept, outcome = remeasure.better(record(), {"status": "error", "reason": "it broke"})
    assert kept.contaminated == "yes"
    assert "it broke" in outcome


def test_which_cells_are_due() -> None:
    cell = cell_of()
    assert remeasure.is_due(cell, record())
    for changed in ({"contaminated": None}, {"attempts": 2}, {"attempts": None}, {"status": "error"}):
        assert not remeasure.is_due(cell, record(**changed))
    assert not remeasure.is_due(cell, None)
    assert not remeasure.is_due(dataclasses.replace(cell, remeasure=False), record())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e4), st.floats(0, 1e4)), max_size=60))
def test_repetitions_take_a_minute_and_a_quarter_of_the_first_measurements_at_most(
    events: list[tuple[bool, float, float]],
) -> None:
    allowance, first, again, refused = Allowance(), 0.0, 0.0, 0
    for is_first, seconds, train in events:
        measured = record(seconds_total=seconds + train, train_seconds=train)
        if is_first:
            allowance.spend(measured)
            first += seconds + train
        elif allowance.permits(measured):
            again += seconds
            assert again <= (LEAST_SECONDS + SHARE * first) * (1 + 1e-9)
        else:
            refused += 1
            assert again + seconds > (LEAST_SECONDS + SHARE * first) * (1 - 1e-9)
    assert allowance.refused == refused


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12))
def test_a_round_ends_with_its_disturbed_cells(cells: list[tuple[int, bool]]) -> None:
    """Each cell runs once, and the disturbed ones once more, before the next round begins."""
    cells = sorted(cells, key=lambda cell: cell[0])
    jobs = [Job(cell_of(replicate=r), {"cell_id": str(n)}, None, Any) for n, (r, _) in enumerate(cells)]  # type: ignore[arg-type]
    queue, order = JobQueue(jobs), []
    while taken := queue.take():
        job, postponed = taken
        assert not postponed
        again = job.result is not None
        order.append((job.cell.spec.replicate, again, job.cell_id))
        if not again and cells[int(job.cell_id)][1]:
            job.result = record()
            queue.repeat(job)
    expected = [(r, False, str(n)) for n, (r, _) in enumerate(cells)]
    expected += [(r, True, str(n)) for n, (r, disturbed) in enumerate(cells) if disturbed]
    assert order == sorted(expected, key=lambda one: (one[0], one[1]))


def test_disturbed_cells_of_an_interrupted_sweep_wait_for_the_end_of_their_round() -> None:
    def job(replicate: int, *, finished: bool) -> Job:
        return Job(cell_of(replicate=replicate), {}, None, Any, record() if finished else None)  # type: ignore[arg-type]

    jobs = [job(0, finished=True), job(1, finished=True), job(0, finished=False), job(1, finished=False)]
    queue = JobQueue(sorted(jobs, key=lambda one: one.cell.spec.replicate))
    taken = []
    while one := queue.take():
        taken.append((one[0].cell.spec.replicate, one[0].result is not None))
    assert taken == [(0, False), (0, True), (1, False), (1, True)]
