"""Compiled cells through the whole sweep: their records, ids, training, resumption and refusals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import HANG_SECONDS, wait_until
from test_sweep import apart, children

from bench.records import Record, read_all

CELL = ["seq_len=32", "depth=2", "model.d_model=16", "data=files", "data.path=corpus.txt", "measure=quick"]
CELL += ["measure.time_seconds=0", "measure.min_samples=1", "measure.limit_seconds=3600", "name=cells"]
TRAINED = ["measure.train_tokens=1600", "measure.eval_tokens=1024", "measure.checkpoint_seconds=0"]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a short name, because sockets need one."""
    made = tmp_path_factory.mktemp("c")
    (made / "corpus.txt").write_text(" ".join(map(str, range(10_000))))
    return made


def start(folder: Path, overrides: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    env = {**apart(folder), **environment}
    if "PATH" in environment:
        env.pop("CXX", None)
    command = [sys.executable, "-m", "bench", "-m", *CELL, *overrides]
    return subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> str:
    """Wait for the end; returns stderr."""
    _, errors = process.communicate(timeout=HANG_SECONDS)
    return errors


def records_in(folder: Path) -> list[Record]:
    found, problems = read_all(folder / "results/cells")
    assert not problems
    return found


def compiler_files(folder: Path) -> list[Path]:
    return list(folder.glob("longctx-bench-compile-*"))


def test_a_cell_without_a_compiler_is_refused_in_one_line(folder: Path) -> None:
    """No process is started for it."""
    said = end(start(folder, ["variant=dense", "compile=block,model"], PATH=str(folder)))
    for record in records_in(folder):
        assert record.status == "unsupported"
        assert record.reason is not None
        assert record.reason.startswith(f"compile={record.compile} needs a C++ compiler; there is no ")
        assert "\n" not in record.reason
        assert record.reason in said
        assert record.seconds_total is None
    assert {record.compile for record in records_in(folder)} == {"block", "model"}


@pytest.mark.slow
def test_what_cannot_be_compiled_is_refused_in_one_line(folder: Path) -> None:
    mine = folder / "g++"
    mine.touch(mode=0o755)
    path = os.pathsep.join((str(folder), os.environ["PATH"]))
    end(start(folder, ["variant=dense", "compile=model", "activations=reversible"], PATH=path))
    end(start(folder, ["variant=dense", "compile=block", "measure=plan"], PATH=path))
    reasons = {record.compile: record.reason for record in records_in(folder)}
    assert {record.status for record in records_in(folder)} == {"unsupported"}
    assert str(reasons["model"]).startswith("activations=reversible: with compile=model: ")
    assert str(reasons["block"]).startswith("compile=block: a plan runs on fake tensors")
    assert not compiler_files(folder)


@pytest.mark.slow
@needs_compiler
def test_a_sweep_over_compile_gives_the_same_losses(folder: Path) -> None:
    end(start(folder, ["compile=off,block", "variant=dense,longformer", *TRAINED]))
    found = records_in(folder)
    assert [record.status for record in found] == ["ok"] * 4
    assert len({record.cell_id for record in found}) == 4
    for variant in ("dense", "longformer"):
        off, block = (
            next(r for r in found if (r.variant, r.compile) == (variant, how)) for how in ("off", "block")
        )
        assert block.nll == pytest.approx(off.nll, rel=1e-4)
        assert block.flops_executed_step == off.flops_executed_step
        assert block.launches_step == off.launches_step
        assert (off.compile_seconds, off.graph_breaks, off.recompiles) == (None, None, None)
        assert block.compile_seconds is not None
        assert block.compile_seconds > 0
        assert (block.graph_breaks, block.recompiles) == (0, 0)
        assert (off.peak_bytes_source, block.peak_bytes_source) == ("live_storage", "cpu_allocator")
        assert block.peak_bytes == pytest.approx(off.peak_bytes, rel=0.3)
        assert block.peak_grad_bytes is None
        assert block.step_seconds_median is not None
    assert not compiler_files(folder)


@pytest.mark.slow
@needs_compiler
def test_a_killed_compiled_training_resumes_to_the_same_result(folder: Path) -> None:
    overrides = ["compile=block", "variant=dense", *TRAINED]
    process = start(folder, overrides)
    checkpoints = folder / "results/cells/checkpoints"
    wait_until(lambda: process.poll() is not None or list(checkpoints.glob("*.pt")))
    (cell,) = (child for server in children(process.pid) for child in children(server))
    os.kill(cell, signal.SIGKILL)
    end(process)
    assert [record.status for record in records_in(folder)] == ["error"]
    assert not compiler_files(folder)
    assert "training resumes after step" in end(start(folder, overrides))
    (resumed,) = records_in(folder)
    assert resumed.status == "ok"
    assert "training resumes" not in end(start(folder, [*overrides, "name=through"]))
    (through,), _ = read_all(folder / "results/through")
    assert (resumed.nll, resumed.tokens_trained) == (through.nll, through.tokens_trained)


@pytest.mark.slow
@needs_compiler
def test_a_cell_that_is_stopped_at_its_limit_leaves_no_files_of_the_compiler(folder: Path) -> None:
    end(start(folder, ["compile=block", "variant=dense", "measure.limit_seconds=0.5"]))
    (record,) = records_in(folder)
    assert record.status == "timeout"
    assert not compiler_files(folder)
