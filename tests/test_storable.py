"""What a record could not give back is refused before it is measured, and what is measured is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS
from hydra import compose, initialize_config_dir
from test_records import record_of
from test_sweep import apart

from bench import CONFIGS, records
from bench.config.parse import parse
from bench.config.spec import Cell, ClusterSpec
from bench.inputs.errors import ConfigError
from bench.records import Record
from bench.records.bounds import MAX_INT
from bench.records.check import check
from bench.records.compact import compact
from bench.report.data.collect import collect
from bench.run import cluster, prepare, sweep

TINY = ["data=stdlib", "measure=plan", "seq_len=16", "depth=1", "model.d_model=16", "device=cpu"]
BEYOND = 2**63


def cell_of(folder: Path, *overrides: str) -> Cell:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose("config", overrides=[*TINY, f"results_dir={folder}", *overrides]))


UNSTORABLE = {
    "replicate": [f"replicate={BEYOND}"],
    "replicate, far": [f"replicate={10**30}"],
    "twin": [f"twin={BEYOND}"],
    "ff_chunks": [f"model.ff_chunks={BEYOND}"],
    "vocab_size": [f"model.vocab_size={BEYOND}"],
    "rotary_base": ["model.rotary_base=inf"],
    "head_size": ["model.head_size=9", "model.head_size=0"],
    "seq_len": [f"seq_len={BEYOND}"],
    "depth": [f"depth={BEYOND}"],
    "batch_size": [f"batch_size={BEYOND}"],
    "d_model": [f"model.d_model={2 * BEYOND}"],
    "variant_params.chunk": ["variant=chunked", f"variant.chunk={BEYOND}"],
    "variant_params.window": ["variant=longformer", f"variant.window={10**400}"],
    "variant_params.n_features": ["variant=performer", f"variant.n_features={BEYOND}"],
    "data_params.n_pairs": ["data=mqar", f"data.n_pairs={BEYOND}", "seq_len=64"],
    "learning_rate": ["measure=standard", "measure.learning_rate=inf"],
    "learning_rate, far": ["measure=standard", "measure.learning_rate=1e200"],
    "train_amount": ["measure=standard", f"measure.train_tokens={10**120}"],
    "name": ["name='n\udcff'"],
}


@pytest.mark.parametrize("knob", UNSTORABLE)
def test_what_a_record_could_not_hold_is_refused_in_a_line(knob: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as said:
        prepare.prepare_jobs([cell_of(tmp_path, *UNSTORABLE[knob])])
    line = str(said.value)
    assert knob.split(",")[0].rpartition(".")[2] in line
    assert "allowed" in line or "lone surrogate" in line
    assert "\n" not in line
    assert len(line) < 500
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c\udcff.txt"
    path.write_text("the quick brown fox\n" * 100)
    cell = cell_of(tmp_path / "results")
    params = cell_of_files(tmp_path).spec.data.params | {"path": str(path)}
    data = replace(cell.spec.data, name="files", params=params)
    with pytest.raises(ConfigError, match=r"data_params=.*udcff.*allowed are"):
        prepare.prepare_jobs([replace(cell, spec=replace(cell.spec, data=data))])


def cell_of_files(folder: Path) -> Cell:
    (folder / "c.txt").write_text("the quick brown fox\n" * 100)
    return cell_of(folder / "results", "data=files", f"data.path={folder / 'c.txt'}")


@pytest.mark.parametrize("arguments", [[f"replicate={BEYOND}"], [f"twin={BEYOND}"], ["name='n\udcff'"]])
def test_a_process_says_so_too_and_writes_nothing(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", *TINY, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_the_largest_numbers_are_kept(tmp_path: Path) -> None:
    for knob in ("replicate", "twin"):
        (job,) = prepare.prepare_jobs([cell_of(tmp_path, f"{knob}={MAX_INT}")])
        sweep.store_record(job, Record(**job.known, status="ok"))
        found = records.read(tmp_path / "adhoc", job.cell_id)
        assert found
        assert getattr(found, knob) == MAX_INT


def test_words_of_an_error_are_kept_whatever_their_bytes(tmp_path: Path) -> None:
    (job,) = prepare.prepare_jobs([cell_of(tmp_path)])
    sweep.store_record(job, Record(**job.known, status="error", reason="FileNotFoundError: 'c\udcff.txt'"))
    found = records.read(tmp_path / "adhoc", job.cell_id)
    assert found
    assert found.reason == r"FileNotFoundError: 'c\udcff.txt'"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step_seconds_median", 0.0),
        ("step_seconds_median", -1.0),
        ("forward_seconds_samples", [0.1, 0.0]),
        ("tokens_per_second", 0.0),
        ("peak_bytes", 0),
        ("peak_bytes", -5),
        ("param_bytes", 2**63),
        ("mfu", 1.5),
        ("accuracy", -0.1),
        ("accuracy_by_distance", [0.5, 1.1]),
        ("nll", -2.0),
        ("perplexity", 0.0),
        ("threads", 0),
        ("effective_context", 0),
        ("learning_rate", 1e300),
    ],
)
def test_figures_that_cannot_be_are_named_and_the_cell_has_failed(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(records.RecordError, match=rf"{key}.*: allowed is "):
        records.parse(record_of(**{key: value}).to_json())
    (job,) = prepare.prepare_jobs([cell_of(tmp_path)])
    sweep.store_record(job, Record(**job.known | {key: value}, status="ok", started_at="2026-01-01"))
    found, problems = records.read_all(tmp_path / "adhoc")
    assert not problems
    assert [(one.status, key in (one.reason or ""), one.started_at) for one in found] == [
        ("error", True, "2026-01-01")
    ]


# --- limits ---------------------------------------------------------------------------------------

LIMITS = [1e-300, 2**31 / 1000, 2147484, 3e6, 1e9, 1e18, 1e300, float("inf")]


@pytest.mark.parametrize("seconds", LIMITS)
def test_a_job_of_a_cluster_takes_any_limit(seconds: float, tmp_path: Path) -> None:
    cell = cell_of(tmp_path, f"measure.limit_seconds={seconds!r}")
    minutes = cluster.requirements(ClusterSpec(), [[cell]]).minutes
    assert minutes
    assert 5 <= minutes <= 366 * 24 * 60


@pytest.mark.slow
def test_a_cell_takes_any_limit(tmp_path: Path) -> None:
    """However far; the last has one of its memory that is as far."""
    knobs = [
        f"{{replicate: {place}, measure: plan, measure.limit_seconds: {limit!r}}}"
        for place, limit in enumerate(LIMITS)
    ]
    knobs.append("{replicate: 99, measure: quick, measure.time_seconds: 0, measure.limit_bytes: 9.2e18}")
    grids = f"hydra.sweeper.grids=[{','.join(knobs)}]"
    tiny = [knob for knob in TINY if knob != "measure=plan"]
    command = [sys.executable, "-m", "bench", "-m", *tiny, grids]
    done = subprocess.run(
        command, cwd=tmp_path, env=apart(tmp_path), capture_output=True, text=True, timeout=HANG_SECONDS
    )
    found, problems = records.read_all(tmp_path / "results/adhoc")
    assert not problems
    statuses = {record.replicate: (record.status, record.reason) for record in found}
    late = statuses.pop(0)
    assert late[0] == "timeout"
    assert statuses == dict.fromkeys([*range(1, len(LIMITS)), 99], ("ok", None)), done.stderr
    assert done.returncode == 1


# --- order ----------------------------------------------------------------------------------------

NOW = int(time.time() * 1e6)
AHEAD = "2999-01-01T00:00:00+00:00"
BEFORE: dict[str, dict[str, Any]] = {
    "an older date": {"started_at": "2020-01-01T00:00:00+00:00"},
    "no date": {"started_at": None},
    "a date that is none": {"started_at": "yesterday"},
    "a clock ahead": {"started_at": AHEAD},
    "a clock ahead, another zone": {"started_at": "2999-01-01T00:00:00+14:00"},
    "a clock ahead, no zone": {"started_at": "2999-01-01"},
    "a clock ahead, numbered": {"started_at": AHEAD, "sequence": 32503680000000000},
    "numbered ahead": {"started_at": "2020-01-01T00:00:00+00:00", "sequence": NOW + 10**12},
    "numbered": {"started_at": "2020-01-01T00:00:00+00:00", "sequence": 5},
    "other code, a clock ahead": {"started_at": AHEAD, "code_sha256": "old", "cell_id": "0" * 16},
    "the end of numbers": {"started_at": "2020-01-01", "sequence": MAX_INT - 1},
}


@pytest.mark.parametrize("gathered", [False, True], ids=["single", "part"])
@pytest.mark.parametrize("kind", BEFORE)
def test_what_was_measured_last_counts(kind: str, gathered: bool, tmp_path: Path) -> None:
    folder = tmp_path / "adhoc"
    cell = cell_of(tmp_path, "force=true")
    known = prepare.identity(cell)
    records.write(folder, Record(**known | {"status": "ok", "params": 1} | BEFORE[kind]))
    if gathered:
        compact(folder)
    (job,) = prepare.prepare_jobs([cell])
    sweep.store_record(job, Record(**known, status="ok", params=2, started_at="2026-11-26T00:00:00+00:00"))
    for _ in range(2):
        now = records.read(folder, job.cell_id)
        assert now
        assert now.params == 2
        assert list(collect(folder).frame["params"]) == [2.0], "nothing new is called stale"
        compact(folder)
    future = [problem.kind for problem in check(folder)].count("future")
    assert future == (1 if BEFORE[kind].get("code_sha256") else 0), "what is ahead and still there is named"


def test_folders_of_two_machines_are_merged_by_time(tmp_path: Path) -> None:
    """Each numbers its own; where both have a cell, the one that was written later counts."""
    cell = cell_of(tmp_path, "force=true")
    texts = []
    for params, machine in enumerate(("a", "b", "a")):
        (job,) = prepare.prepare_jobs([replace(cell, folder=tmp_path / machine)])
        kept = sweep.store_record(job, Record(**job.known, status="ok", params=params + 1))
        texts.append(kept)
    assert [one.sequence for one in texts] == sorted({one.sequence or 0 for one in texts})
    for order in (texts, texts[::-1]):
        folder = tmp_path / f"merged{order[0].params}"
        for place, record in enumerate(order):
            path = records.path_of(folder, f"copy{place}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(record.to_json())
        assert [one.params for one in records.read_all(folder)[0]] == [3]


def test_a_record_says_when_its_date_is_yet_to_come(tmp_path: Path) -> None:
    records.write(tmp_path, record_of(started_at=AHEAD))
    records.write(tmp_path, record_of(cell_id="c1", started_at="2020-01-01"))
    assert [problem.kind for problem in check(tmp_path)] == ["future"]
    assert json.loads(records.path_of(tmp_path, "c0").read_text())["sequence"] is None
