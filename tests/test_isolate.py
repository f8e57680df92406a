"""Cells that end badly: each becomes a record with its status and reason, and the sweep goes on.

A plug-in variant, installed as any package would be, goes wrong in the training step in the way that its
knob says; the cells are those of `python -m bench`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.records import Record, read_all

PLUGIN = """
import ctypes, os, signal, sys, time
from dataclasses import dataclass
import torch
from variants.base import Out
from variants.dense import Dense, DenseConfig


@dataclass(frozen=True, kw_only=True)
class TroubleConfig(DenseConfig):
    how: str = "fine"


def hang():
    open(os.environ["TMPDIR"] + "/hangs", "w").close()
    while True:
        time.sleep(1)


def refuse():
    raise RuntimeError("the kernel refused\\nand said more than one line")


def spend():
    raise MemoryError("all of it")


ENDS = {
    "raise": refuse,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "leave": lambda: os._exit(0),
    "exit": lambda: sys.exit(3),
    "hang": hang,
    "memory": spend,
    "huge": lambda: torch.empty(2**55),
}


class Trouble(Dense):
    Config = TroubleConfig

    def forward(self, x, *, causal, state=None):
        out = super().forward(x, causal=causal)
        if not self.training:  # the gates pass
            return out
        if self.config.how == "nan":
            return Out(out.y * float("nan"))
        if self.config.how in ENDS and type(x).__name__ != "FakeTensor":  # so does the prediction
            ENDS[self.config.how]()
        return out
"""


class Sweep:
    """A sweep over ways to end, in a process of its own."""

    def __init__(self, folder: Path, ways: list[str], *overrides: str) -> None:
        self.ways, self.results = ways, folder / ways[-1]
        knobs = [f"variant.how={','.join(ways)}", "variant=trouble", "seq_len=24", "depth=1", "data=files"]
        knobs += [f"data.path={folder / 'corpus.txt'}", "model.d_model=16", f"results_dir={self.results}"]
        knobs += ["measure=standard", "measure.time_seconds=0", "measure.min_samples=2"]
        knobs += ["measure.train_tokens=100", "measure.eval_tokens=50", *overrides]
        # nobody's sweep is waited for, and no two of these run at once
        own = {"TMPDIR": str(folder), "LONGCTX_BENCH_LOCKS": str(folder)}
        env = {**os.environ, **own, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench", "-m", *knobs]
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self) -> Sweep:
        self.out, self.errors = self.process.communicate()
        found, problems = read_all(self.results / "adhoc")
        assert not problems
        self.records: dict[str, Record] = {record.variant_params["how"]: record for record in found}
        return self


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sweep]:
    """Way to end → the sweep it was part of."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "trouble.py").write_text(PLUGIN)
    (folder / "trouble.yaml").write_text("impl: sdpa\nhow: fine\n")
    info = folder / "trouble-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[longctx_bench.variants]\ntrouble = trouble:Trouble\n")
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    started = [
        Sweep(folder, ["raise", "kill", "segfault", "leave", "exit", "nan", "fine"]),
        Sweep(folder, ["memory", "huge", "also_fine"]),
        Sweep(folder, ["hang"], "measure.limit_seconds=8"),
    ]
    return {way: sweep for sweep in map(Sweep.finish, started) for way in sweep.ways}


ENDINGS = {
    "raise": ("error", "RuntimeError: the kernel refused"),
    "kill": ("error", "killed by SIGKILL"),
    "segfault": ("error", "killed by SIGSEGV"),
    "leave": ("error", "exit status 0 and no result"),
    "exit": ("error", "exit status 3 and no result"),
    "nan": ("diverged", "nan at training step 1 of "),
    "hang": ("timeout", "measure.limit_seconds=8"),
    "memory": ("oom", "MemoryError: all of it"),
    "huge": ("oom", "can't allocate memory"),
}


@pytest.mark.parametrize("way", ENDINGS)
def test_an_end_has_its_status_and_its_reason(sweeps: dict[str, Sweep], way: str) -> None:
    status, reason = ENDINGS[way]
    sweep = sweeps[way]
    record = sweep.records[way]
    assert record.status == status
    assert reason in (record.reason or "")
    assert "\n" not in (record.reason or "")
    assert record.nll is None, "a cell that did not finish has no quality"
    assert record.seconds_total is not None
    assert record.started_at is not None


@pytest.mark.parametrize("way", ["raise", "kill", "segfault", "leave", "exit", "nan", "memory"])
def test_what_was_told_before_the_end_is_kept(sweeps: dict[str, Sweep], way: str) -> None:
    """The gates ran first. Their figures survive whatever the process came to."""
    record = sweeps[way].records[way]
    assert record.leak_max_abs is not None
    assert record.reference_max_abs is not None
    assert record.threads == 1
    assert (record.step_seconds_median is not None) == (way == "nan"), "NaN is timed, and trained on"


@pytest.mark.parametrize("way", ["fine", "also_fine"])
def test_the_rest_of_the_sweep_is_unharmed(sweeps: dict[str, Sweep], way: str) -> None:
    """Each comes last, after every failure of its sweep."""
    sweep = sweeps[way]
    assert set(sweep.records) == set(sweep.ways)
    record = sweep.records[way]
    assert (record.status, record.reason) == ("ok", None)
    assert record.perplexity is not None
    assert record.peak_bytes == record.peak_bytes_predicted


def test_a_cell_that_diverges_names_the_step(sweeps: dict[str, Sweep]) -> None:
    found = {way: sweeps[way].records[way].diverged_step for way in ENDINGS}
    assert found == {**dict.fromkeys(ENDINGS), "nan": 1}


def test_a_sweep_with_a_failure_says_so(sweeps: dict[str, Sweep]) -> None:
    for way, failed in (("raise", 6), ("hang", 1)):
        sweep = sweeps[way]
        assert sweep.process.returncode == 1
        if len(sweep.ways) > 1:
            assert f"{failed} of {len(sweep.ways)} cells failed:" in sweep.errors
    assert "Traceback" in sweeps["raise"].errors, "the whole of an error goes to the terminal"


def test_running_out_of_memory_is_an_answer(sweeps: dict[str, Sweep]) -> None:
    assert sweeps["memory"].process.returncode == 0
    assert "failed" not in sweeps["memory"].errors


def test_no_process_is_left(sweeps: dict[str, Sweep]) -> None:
    """Not the cell that was stopped, nor the server that cells start from."""
    wait_until(lambda: not processes(sweeps["hang"]))


def test_a_sweep_that_is_killed_takes_its_cell_with_it(sweeps: dict[str, Sweep]) -> None:
    """Or it would compute for nobody, beside the same cell once the sweep is started again."""
    folder = sweeps["hang"].results.parent
    (folder / "hangs").unlink(missing_ok=True)
    again = Sweep(folder, ["hang"], "measure.limit_seconds=600")
    try:
        wait_until((folder / "hangs").exists)
    finally:
        again.process.kill()
    wait_until(lambda: not processes(again))
    again.process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes(sweep: Sweep) -> list[str]:
    """Everything that runs for the sweep, or for another in its folder: all inherit its TMPDIR."""
    mark = f"TMPDIR={sweep.results.parent}".encode()
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/environ") if holds(path, mark)]


def holds(environ: Path, entry: bytes) -> bool:
    try:
        return entry in environ.read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or somebody else's
        return False
