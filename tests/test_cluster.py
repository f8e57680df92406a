"""Cells as jobs: real launchers, real processes, the records that a run without them leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import slurm_stand_in
from conftest import HANG_SECONDS
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench import CONFIGS
from bench.config import parse
from bench.config.spec import Cell, CellSpec, ClusterSpec, DataSpec, MeasureSpec, ModelSizes
from bench.records import FINAL, KEYS
from bench.run import cluster, prepare, sweep

needs_submitit = pytest.mark.skipif(
    not find_spec("hydra_plugins.hydra_submitit_launcher"), reason="hydra-submitit-launcher is not installed"
)
needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed")

GUIDE = (Path(__file__).parents[1] / "docs/cluster.md").read_text()
QUICK = ["data=stdlib", "measure=quick", "measure.time_seconds=0", "seq_len=32", "depth=1"]
SWEEP = ["-m", *QUICK, "variant=dense,chunked", "objective=clm,mlm"]


def start(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    cwd.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "bench", *arguments]
    env = {**os.environ, **environment}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def bench(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, cwd=cwd, **environment)
    out, err = process.communicate(timeout=HANG_SECONDS)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def told(folder: Path) -> dict[str, tuple[str, frozenset[str], str | None]]:
    """Status, keys that have a figure and reason of each cell, by its id."""
    found = [json.loads(path.read_text()) for path in (folder / "results/adhoc/records").glob("*.json")]
    surroundings = re.compile("contaminated|_share|foreign|load_|sampling")
    return {
        record["cell_id"]: (
            record["status"],
            frozenset(k for k, v in record.items() if v is not None and not surroundings.search(k)),
            record["reason"],
        )
        for record in found
    }


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a sweep in this process leaves."""
    folder = tmp_path_factory.mktemp("here")
    done = bench(*SWEEP, cwd=folder)
    assert done.returncode == 0, done.stderr
    found = told(folder)
    assert len(found) == 4
    assert {status for status, *_ in found.values()} <= FINAL
    return found


# --- launchers ------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_submitit
def test_processes_of_submitit_leave_the_records_of_a_run_without(
    here: dict[str, Any], tmp_path: Path
) -> None:
    launched = [*SWEEP, "hydra/launcher=submitit_local"]
    done = bench(*launched, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "jobs: 1, for 4 of 4 cells" in done.stderr
    assert told(tmp_path) == here
    again = bench(*launched, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 cells were finished before" in again.stderr
    assert "jobs:" not in again.stderr


@needs_submitit
@pytest.mark.slow
def test_an_array_of_slurm_leaves_the_records_of_a_run_without(here: dict[str, Any], tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    slurm_stand_in.install(commands)
    knobs = ["cluster=slurm", "device=cpu", "cluster.partition=long", "cluster.cells_per_job=3"]
    done = bench(*SWEEP, *knobs, cwd=tmp_path, PATH=f"{commands}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert told(tmp_path) == here
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (commands / "submitted.sh").read_text(), re.M))
    assert options["array"] == "0-1%2"
    assert options["partition"] == "long"
    assert options["gpus-per-node"] == "0"
    assert options["mem"] == "32GB"
    limit = float(config_of("measure=quick").measure.limit_seconds)
    assert int(options["time"]) * 60 >= 3 * limit
    assert int(options["time"]) * 60 < 3 * limit + 900
    assert (tmp_path / "results/adhoc/jobs").is_dir()


@pytest.mark.slow
def test_an_array_without_a_launcher_shares_the_work(here: dict[str, Any], tmp_path: Path) -> None:
    """The script of the guide as it stands there, on two tasks."""
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", GUIDE, re.DOTALL)
    slurm_stand_in.install(tmp_path / "bin")
    (tmp_path / "sweep.sbatch").write_text(re.sub(r"--array=\S+", "--array=0-1", script))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["sbatch", "--wait", "sweep.sbatch", *SWEEP], cwd=tmp_path, env=environment, check=True)
    assert told(tmp_path) == here
    logs = [(tmp_path / f"bin/{task}.log").read_text() for task in (0, 1)]
    measured = [line for log in logs for line in log.splitlines() if re.match(r"\[\d/4\] (ok|unsup)", line)]
    assert len(measured) == 4, logs


@needs_ray
@pytest.mark.slow
def test_tasks_of_ray_leave_the_records_of_a_run_without(here: dict[str, Any], tmp_path: Path) -> None:
    done = bench(*SWEEP, "cluster=ray", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path) == here


@needs_ray
@pytest.mark.slow
def test_a_task_of_ray_that_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    """Its cell is named as one without a record, the others have theirs, and the next run has only it."""
    cell = ["data=stdlib", "seq_len=64", "depth=1", "measure.time_seconds=0", "measure.eval_tokens=64"]
    some = ["-m", *cell, "measure.train_tokens=10_000_000_000,64", "cluster=ray", "measure.limit_seconds=500"]
    process = start(*some, cwd=tmp_path)
    folder = tmp_path / "results/adhoc"
    wait_for(lambda: list(folder.glob("curves/*")), process)
    os.kill(of_sweep_in("ray::_work", tmp_path), signal.SIGKILL)
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1, said
    assert "a job failed" in said
    assert "cells without a record: 1; the same command runs them" in said
    assert [status for status, *_ in told(tmp_path).values()] == ["ok"]


@needs_submitit
@pytest.mark.slow
def test_a_job_that_dies_leaves_its_cells_to_the_next_run(here: dict[str, Any], tmp_path: Path) -> None:
    launched = ["hydra/launcher=submitit_local", "cluster.cells_per_job=1", "hydra.launcher.timeout_min=60"]
    endless = ["-m", *QUICK[:1], "seq_len=64", "depth=1", "measure.train_tokens=10_000_000_000"]
    process = start(*endless, "measure.time_seconds=0", *launched, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("results/adhoc/.claims")), process)
    os.kill(of_sweep_in("submitit.core._submit", tmp_path), signal.SIGKILL)
    _, said = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 1, said
    assert "the launcher failed" in said
    assert "cells without a record: 1; the same command runs them:\n  dense T=64 depth=1 keep #0" in said
    assert told(tmp_path) == {}


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not what():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def of_sweep_in(name: str, folder: Path) -> int:
    """The process whose command line begins with or holds the name and which works in the folder."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, cwd = (path / "cmdline").read_bytes().decode(), (path / "cwd").resolve()
        except OSError:
            continue
        if name in line and "IDLE" not in line and cwd == folder.resolve():
            return int(path.name)
    raise AssertionError(f"no {name} in {folder}")


# --- what needs no launcher -----------------------------------------------------------------------


def test_a_mistake_in_the_last_cell_hands_nothing_over(tmp_path: Path) -> None:
    done = bench("-m", *QUICK[:3], "depth=1", "seq_len=32,none", "cluster=ray", cwd=tmp_path)
    assert done.returncode == 2
    assert "seq_len='none'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_launcher_that_is_not_installed_is_named_with_the_extra(tmp_path: Path) -> None:
    done = bench("-m", *QUICK, "hydra/launcher=submitit_slum", cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra/launcher=submitit_slum: unknown; allowed are basic" in done.stderr
    assert "extra `cluster`" in done.stderr


COMMANDS = re.findall(r"^ *(?:CUDA\S+ )?python -m bench (.*?)(?: &)?$", GUIDE, re.MULTILINE)


@needs_submitit
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_composes(command: str) -> None:
    assert config_of(*[part for part in shlex.split(command) if part != "-m"])


def test_the_guide_s_knobs_are_those_of_the_config() -> None:
    assert len(COMMANDS) >= 6
    knobs = set(re.findall(r"`(cluster\.\w+)", GUIDE))
    assert knobs <= {f"cluster.{field.name}" for field in dataclasses.fields(ClusterSpec)}
    written = set(re.findall(r"^  (\w+):", (CONFIGS / "cluster/slurm.yaml").read_text(), re.MULTILINE))
    assert {f"cluster.{knob}" for knob in written - {"name", "mode", "launcher"}} <= knobs


def config_of(*overrides: str) -> CellSpec:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse.parse(compose("config", overrides=list(overrides))).spec


def cells(folder: Path, count: int, **changed: Any) -> list[Cell]:
    data = DataSpec(name="stdlib", params={})
    common = {"variant": "dense", "variant_params": {"impl": "sdpa"}, "depth": 1, "batch_size": 1}
    common |= {"replicate": 0, "objective": "clm", "device": "cpu", "dtype": "float32", "activations": "keep"}
    common |= {"model": ModelSizes(), "data": data, "measure": MeasureSpec(limit_seconds=600), **changed}
    made = [CellSpec(**common, seq_len=32 * (n + 1)) for n in range(count)]  # type: ignore[arg-type]
    return [Cell(spec=spec, folder=folder / "results", name="adhoc", force=False) for spec in made]


Handed = list[tuple[ClusterSpec, list[list[list[str]]]]]


@pytest.fixture
def handed() -> Iterator[Handed]:
    """What a launcher got; and nothing of it stays with this process."""
    sweep.finished.clear(), sweep.unrecorded.clear()
    yield []
    sweep.finished.clear(), sweep.unrecorded.clear()


def launcher(handed: Handed, answers: Sequence[Any]) -> cluster.Launch:
    """Keeps what it is handed, and answers or raises in turn."""
    turns = iter(answers)

    def launch(knobs: ClusterSpec, jobs: list[list[str]]) -> Any:
        handed.append((knobs, [unquoted(value.partition("=")[2]) for (value,) in jobs]))
        answer = next(turns)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return launch


def test_jobs_are_pieces_of_the_sweep_on_one_kind_of_device_each(tmp_path: Path, handed: Handed) -> None:
    asked = [*cells(tmp_path, 5), *cells(tmp_path, 2, device="cuda", replicate=1)]
    lines = [[f"n={n}", "device=auto"] for n in range(7)]
    cluster.run(asked, lines, ClusterSpec(cells_per_job=2), launcher(handed, [[[], [], []], [[]]]))
    (on_cpu, jobs), (on_gpu, other) = handed
    assert [[line[0] for line in job] for job in jobs] == [["n=0", "n=1"], ["n=2", "n=3"], ["n=4"]]
    assert [[line[0] for line in job] for job in other] == [["n=5", "n=6"]]
    assert {line[-1] for job in jobs for line in job} == {"device=cpu"}, "the last override counts"
    assert {line[-1] for job in other for line in job} == {"device=cuda"}
    assert (on_cpu.gpus, on_gpu.gpus) == (0, 1)
    assert (on_cpu.cpus, on_gpu.cpus) == (len(os.sched_getaffinity(0)), 1)
    assert on_cpu.minutes is not None
    assert 20 < on_cpu.minutes < 40
    assert len(sweep.unrecorded) == 7


def test_no_array_is_larger_than_a_scheduler_takes(
    tmp_path: Path, handed: Handed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "MOST_JOBS", 3)
    lines = [[str(n)] for n in range(8)]
    cluster.run(cells(tmp_path, 8), lines, ClusterSpec(), launcher(handed, [[], [], []]))
    assert [len(jobs) for _, jobs in handed] == [3, 3, 2]


def test_records_come_back_without_a_shared_folder(
    tmp_path: Path, handed: Handed, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two machines: what the one wrote, the other is told, writes, and knows the next time."""
    far, near = cells(tmp_path / "far", 3), cells(tmp_path / "near", 3)
    measured = [
        {**dict.fromkeys(KEYS), **prepare.identity(cell), "schema_version": version(), "status": status}
        for cell, status in zip(far, ("ok", "error", "ok"), strict=True)
    ]
    strange = {**measured[0], "cell_id": "0" * 16}
    answers = [[[json.dumps(measured[0]), json.dumps(measured[1])], [json.dumps(strange)]]]
    got = cluster.run(near, [["n"]] * 3, ClusterSpec(cells_per_job=2), launcher(handed, answers))
    assert [record.status for record in got] == ["ok", "error"]
    assert [cell.spec.seq_len for cell in sweep.unrecorded] == [96]
    assert "other code or data" in capsys.readouterr().err
    assert {path.stem for path in (tmp_path / "near/results/records").glob("*.json")} == {
        str(record["cell_id"]) for record in measured[:2]
    }
    cluster.run(near, [["n"]] * 3, ClusterSpec(cells_per_job=2), launcher(handed, [[[]]]))
    assert sum(map(len, handed[-1][1])) == 2, "the one that is ok is not handed over again"


def version() -> int:
    from bench.records import SCHEMA_VERSION

    return SCHEMA_VERSION


def test_a_launcher_that_gives_up_leaves_what_is_recorded(
    tmp_path: Path, handed: Handed, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.records import Record, write

    one, other = cells(tmp_path, 2)

    class Dies(RuntimeError):
        def __init__(self) -> None:  # a job wrote its record, another one died
            write(one.folder, Record(**prepare.identity(one), status="ok"))
            super().__init__("job 17 died\nand more")

    def launch(knobs: ClusterSpec, jobs: list[list[str]]) -> Any:
        raise Dies

    got = cluster.run([one, other], [["n"]] * 2, ClusterSpec(), launch)
    assert [record.seq_len for record in got] == [32]
    assert [cell.spec.seq_len for cell in sweep.unrecorded] == [64]
    assert capsys.readouterr().err.endswith("may still be running: job 17 died\n")


def test_a_job_that_fails_is_told_and_the_others_count(
    tmp_path: Path, handed: Handed, capsys: pytest.CaptureFixture[str]
) -> None:
    made = cells(tmp_path, 2)
    record = {**dict.fromkeys(KEYS), **prepare.identity(made[1]), "schema_version": version(), "status": "ok"}
    answers = [[ValueError("no corpus here"), [json.dumps(record)]]]
    got = cluster.run(made, [["n"]] * 2, ClusterSpec(), launcher(handed, answers))
    assert [r.cell_id for r in got] == [record["cell_id"]]
    assert "a job failed: no corpus here\n" in capsys.readouterr().err
    assert [cell.spec.seq_len for cell in sweep.unrecorded] == [32]


def unquoted(text: str) -> Any:
    return OverridesParser.create().parse_overrides([f"+cells={text}"])[0].value()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])))))
@example([["variant.windows=[1,2]", "name='it\\'s'", "a=\\", "b=\\\\'", "${seq_len}"], []])
def test_overrides_come_through_hydra_s_grammar_as_they_were(lines: list[list[str]]) -> None:
    assert unquoted(cluster.quote(lines)) == lines


# --- one device, one cell -------------------------------------------------------------------------

HOLDER = """
import sys, time
from functools import cache
from bench.run import locks
from bench.run.devices import Device
say = cache(lambda holder: print(holder, flush=True))
with locks.on_device(Device(sys.argv[1], sys.argv[2] or None), say):
    print("has it", flush=True)
    time.sleep(3600)
"""


def hold(device: str, uuid: str = "", **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, **environment}
    command = [sys.executable, "-c", HOLDER, device, uuid]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def test_a_device_is_one_run_s_whatever_the_temporary_folders(tmp_path: Path) -> None:
    other = tmp_path / "private"
    other.mkdir()
    first = hold("cpu")
    assert first.stdout is not None
    assert first.stdout.readline() == "has it\n"
    second = hold("cpu", TMPDIR=str(other))
    assert second.stdout is not None
    try:
        holder = second.stdout.readline()  # the process, with the beginning of its command
        assert holder.startswith(f"process {first.pid} ({shlex.quote(sys.executable)} -c ")
        first.kill()  # and the system lets go
        assert second.stdout.readline() == "has it\n"
    finally:
        first.kill(), second.kill()
        first.communicate(), second.communicate()


def test_a_plan_waits_for_no_measurement(tmp_path: Path) -> None:
    """The lock of the CPU is held all the time, so that a waiting run would never end."""
    holder = hold("cpu")
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "has it\n"
        planned = bench("measure=plan", "seq_len=64", cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
        assert "waiting" not in planned.stderr
    finally:
        holder.kill(), holder.communicate()


def test_without_abstract_sockets_a_file_is_locked(tmp_path: Path) -> None:
    """As on macOS, whose name the processes are given."""
    here = {"TMPDIR": str(tmp_path)}
    script = HOLDER.replace("import sys, time", "import sys, time; sys.platform = 'darwin'")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, "cpu", ""],
            env={**os.environ, **here},
            stdout=subprocess.PIPE,
            text=True,
        )
    ]
    try:
        assert runs[0].stdout is not None
        assert runs[0].stdout.readline() == "has it\n"
        runs.append(
            subprocess.Popen(runs[0].args, env={**os.environ, **here}, stdout=subprocess.PIPE, text=True)
        )
        assert runs[1].stdout is not None
        assert runs[1].stdout.readline() == "another run\n"
        runs[0].kill()
        assert runs[1].stdout.readline() == "has it\n"
    finally:
        for run in runs:
            run.kill(), run.communicate()


def test_windows_is_told_in_one_line() -> None:
    script = "import sys; sys.platform = 'win32'; import bench"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: longctx-bench does not run on Windows")


def test_runs_on_two_accelerators_of_a_machine_do_not_wait_for_each_other() -> None:
    """Each calls its own cuda: the driver's names differ."""
    runs = [hold("cuda", "GPU-one"), hold("cuda", "GPU-two"), hold("cuda", "GPU-one")]
    try:
        first, second, third = (run.stdout.readline() for run in runs if run.stdout)
        assert second == "has it\n"
        assert sorted([first == "has it\n", third == "has it\n"]) == [False, True]
        assert f"process {runs[0].pid} (" in third or f"process {runs[2].pid} (" in first
    finally:
        for run in runs:
            run.kill(), run.communicate()
