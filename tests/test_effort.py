"""The time left of a sweep, by the efforts of its cells: the first of each configuration searches."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra_sweeps import swept
from test_report import record

from bench.config.spec import Cell
from bench.run import progress as progress_module
from bench.run.effort import efforts
from bench.run.prepare import Job, prepare_jobs
from bench.run.progress import Progress

TRAINED = ("device=cpu", "data=mqar", "seq_len=32", "depth=1", "measure=standard", "batch_size=4")
TRAINED += (
    "measure.train_tokens=8192",
    "measure.train_budgets=3",
    "measure.schedule=wsd",
    "measure.eval_tokens=1024",
)
SEARCH = ("measure.learning_rate=search", "measure.search_rates=[0.001,0.003]")


def jobs_of(tmp_path: Path, *overrides: str) -> list[Job]:
    cells: list[Cell] = swept(*TRAINED, f"results_dir={tmp_path}", *overrides)
    return prepare_jobs(cells)


@pytest.mark.parametrize(("budget", "first"), [("largest", 1 + 2 * 1.0), ("smallest", 1 + 2 * 0.25)])
def test_the_first_cell_of_a_configuration_searches(tmp_path: Path, budget: str, first: float) -> None:
    """The smallest of three budgets is a quarter of the training."""
    jobs = jobs_of(
        tmp_path, *SEARCH, f"measure.search_budget={budget}", "replicate=0,1,2", "variant=dense,chunked"
    )
    found = efforts(jobs)
    of = {(job.cell.spec.variant, job.cell.spec.replicate): found[job.cell_id] for job in jobs}
    assert of == {(v, r): 1.0 if r else first for v in ("dense", "chunked") for r in (0, 1, 2)}


def test_cells_with_a_given_rate_are_alike(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, "replicate=0,1", "variant=dense,chunked")
    assert set(efforts(jobs).values()) == {1.0}


def test_the_time_left_is_by_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each unit takes a minute: after the search, one of three cells takes a third of the time."""
    now = 0.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    shown = Progress({"old": 1.0, "first": 3.0, "second": 1.0, "third": 1.0, "fourth": 2.0})
    assert shown.eta() == "ETA unknown"
    shown.skipped(["old"], 0)
    for cell, seconds, left in (("first", 180, "4:00"), ("second", 60, "3:00"), ("third", 60, "2:00")):
        now += seconds
        shown.finished(record(cell_id=cell))
        assert shown.eta() == f"ETA {left}"
    shown.elsewhere(record(cell_id="fourth"))
    assert shown.eta() == "ETA 0:00"
