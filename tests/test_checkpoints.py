"""A training that is cut short goes on to the same result to the last bit, and nothing else is taken up."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from torch import Tensor

import variants
from bench import records
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.records import Record, read_all
from bench.tasks.text import VOCABULARY, Batch
from bench.train import checkpoints, loss_curve
from bench.train.checkpoints import CheckpointStore
from bench.train.loop import Training, train
from bench.train.schedule import Budget
from variants.base import Workload

SIZES = Workload(causal=True, batch_size=1, seq_len=40, d_model=32, heads=2)
CPU = torch.device("cpu")


# --- in one process ---------------------------------------------------------------------------------


def model_of(name: str, seed: int, device: torch.device = CPU, **knobs: Any) -> LanguageModel:
    torch.manual_seed(seed)
    variant = variants.load(name)
    sizes: dict[str, Any] = {"depth": 2, "dropout": 0.2, "vocabulary": VOCABULARY}
    return LanguageModel(
        ModelSpec.of(variant, variant.Config.of(knobs), feed_forward=feed_forward(mult=2)),
        SIZES,
        activations="keep",
        **sizes,
    ).to(device)


def batches_on(device: torch.device) -> Callable[[int, float], Batch]:
    def batches(step: int, done: float) -> Batch:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 256, (2, SIZES.seq_len + 1), generator=generator).to(device)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    return batches


def store_in(folder: Path, **changed: Any) -> CheckpointStore:
    given_: dict[str, Any] = {"cell_id": "c0", "code_sha256": "code", "device_name": "chip", **changed}
    return CheckpointStore(folder=folder, **{"every_seconds": 0.0, **given_})


@pytest.fixture(autouse=True)
def after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`every_seconds=0` means it, however long writing takes."""
    monkeypatch.setattr(checkpoints, "MAX_TIME_SHARE", math.inf)


class Killed(Exception):
    """Stands for a signal."""


def run(model: LanguageModel, checkpoints: CheckpointStore | None = None, *, until: int = 6) -> Training:
    """Six steps; Killed as the batch of step `until` is asked for."""
    device = next(model.parameters()).device

    def batches(step: int, done: float) -> Batch:
        if step == until:
            raise Killed
        return batches_on(device)(step, done)

    budget = Budget(steps=6)
    return train(
        model,
        batches,
        budget=budget,
        learning_rate=1e-2,
        causal=True,
        step_tokens=80,
        checkpoints=checkpoints,
    )


KNOBS: dict[str, dict[str, Any]] = {
    "performer": {"redraw": 2},
    "reformer": {"chunk": 8},
    "transformer_xl": {"segment": 8, "mem_len": 8},
    "compressive": {"segment": 8, "mem_len": 8, "comp_len": 4},
}


def all_tensors(training: Training, device: torch.device) -> list[Tensor]:
    """Weights, buffers and the optimiser's moments; and what evaluation would draw next."""
    training.model.eval()
    with torch.no_grad():
        logits = [
            out.logits for _, out in training.model.stream(batches_on(device)(9, 0).inputs, causal=True)
        ]
    moments = [t for state in training.optimizer.state.values() for t in state.values()]
    return [*training.model.state_dict(keep_vars=True).values(), *moments, *logits]


def assert_resumes(name: str, folder: Path, device: torch.device = CPU) -> None:
    knobs = KNOBS.get(name, {})
    whole = run(model_of(name, 0, device, **knobs))
    want = all_tensors(whole, device)
    with pytest.raises(Killed):
        run(model_of(name, 0, device, **knobs), store_in(folder), until=3)
    resumed = run(model_of(name, 1, device, **knobs), store_in(folder))
    pairs = zip(all_tensors(resumed, device), want, strict=True)
    assert [row.nll for row in resumed.curve.rows] == [row.nll for row in whole.curve.rows]
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", variants.names())
def test_a_resumed_training_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    """With other weights and another seed to begin with; dropout, hashing and redraws included."""
    variant = variants.load(name)
    if variant.info_for(variant.Config()).caps.causal:
        assert_resumes(name, tmp_path)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["dense", "performer"])
def test_a_device_s_randomness_is_resumed_too(name: str, tmp_path: Path) -> None:
    """Dropout draws from the device's generator. Atomic additions may differ in the last bits."""
    device = torch.device("cuda")
    whole = run(model_of(name, 0, device, **KNOBS.get(name, {})))
    with pytest.raises(Killed):
        run(model_of(name, 0, device, **KNOBS.get(name, {})), store_in(tmp_path), until=3)
    resumed = run(model_of(name, 1, device, **KNOBS.get(name, {})), store_in(tmp_path))
    want = pytest.approx([row.nll for row in whole.curve.rows], rel=1e-4)
    assert [row.nll for row in resumed.curve.rows] == want


def test_without_its_randomness_a_training_would_go_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above could fail."""
    monkeypatch.setattr("bench.train.loop.restore_generators", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_resumes("dense", tmp_path)


def test_a_checkpoint_holds_what_a_clock_has_counted(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(model_of("dense", 0), store_in(tmp_path), until=3)
    state = store_in(tmp_path).read()
    assert state is not None
    assert (state["step"], state["seconds"] > 0) == (3, True)
    resumed = run(model_of("dense", 0), store_in(tmp_path))
    assert resumed.seconds > state["seconds"]
    assert (resumed.tokens, [row.step for row in resumed.curve.rows]) == (480, [1, 2, 3, 4, 5, 6])


def test_checkpoints_are_as_rare_as_is_asked(tmp_path: Path) -> None:
    run(model_of("dense", 0), store_in(tmp_path, every_seconds=60.0))
    assert not checkpoints.path_of(tmp_path, "c0").exists()
    assert records.curve_path_of(tmp_path, "c0").exists(), "the curve is kept at the end"


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def altered(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncated, "truncated or damaged"),
        (altered, "truncated or damaged"),
        (lambda content: b"", "truncated or damaged"),
        (lambda content: b"a file of another program, longer than a digest is", "truncated or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_ignored_with_a_line(
    damage: Callable[[bytes], bytes], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        run(model_of("dense", 0), store_in(tmp_path), until=3)
    path = checkpoints.path_of(tmp_path, "c0")
    path.write_bytes(damage(path.read_bytes()))
    resumed = run(model_of("dense", 0), store_in(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert why in line
    whole = run(model_of("dense", 0))
    assert [row.nll for row in resumed.curve.rows] == [row.nll for row in whole.curve.rows]


@pytest.mark.parametrize(
    ("key", "theirs"), [("code_sha256", "older"), ("cell_id", "c1"), ("device_name", "another chip")]
)
def test_a_checkpoint_of_another_origin_is_ignored_with_a_line(
    key: str, theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        run(model_of("dense", 0), store_in(tmp_path, **{key: theirs}), until=3)
    found = checkpoints.path_of(tmp_path, theirs if key == "cell_id" else "c0")
    found.rename(checkpoints.path_of(tmp_path, "c0"))
    assert store_in(tmp_path).read() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"its {key} is {theirs}" in line


def test_a_checkpoint_of_another_torch_or_threads_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Killed):
        run(model_of("dense", 0), store_in(tmp_path), until=3)
    for change, key in (("torch.get_num_threads", "threads"), ("torch.__version__", "torch_version")):
        with monkeypatch.context() as patch:
            patch.setattr(change, "0.4" if key == "torch_version" else lambda: 4096)
            assert store_in(tmp_path).read() is None
        assert f"its {key} is" in capsys.readouterr().err
    assert store_in(tmp_path).read() is not None


def test_a_checkpoint_that_would_run_code_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "harm",)

    store = store_in(tmp_path)
    store.write({"harm": Harm()}, loss_curve.Curve(), 1)
    assert store.read() is None
    assert not (tmp_path / "harm").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "UnpicklingError" in line


def test_what_is_removed_leaves_nothing_of_the_cell(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.write({}, loss_curve.Curve(), 1)
    other = store_in(tmp_path, cell_id="c1")
    other.write({}, loss_curve.Curve(), 1)
    (store.path.parent / ".c0-killed.tmp").touch()
    checkpoints.remove(tmp_path, "c0")
    checkpoints.remove(tmp_path, "c0")
    assert list(store.path.parent.iterdir()) == [other.path]


# --- with real processes and real signals -----------------------------------------------------------

SCRIPT = """
import json, sys
from hydra import compose, initialize_config_dir
from bench import CONFIGS
from bench.config.parse import parse
from bench.run import sweep

if __name__ == "__main__":
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = [compose("config", overrides=cell) for cell in json.loads(sys.argv[1])]
    sweep.run([parse(cell) for cell in composed])
"""
CELLS = {
    "reformer": ["seq_len=64", "variant.chunk=16", "model.dropout=0.1"],
    "transformer_xl": ["seq_len=64", "variant.segment=32", "variant.mem_len=32"],
    "performer": ["seq_len=64", "variant.redraw=7", "model.dropout=0.1"],
    "hybrid": ["seq_len=64", "depth=2", 'variant.layers=["transformer_xl(segment=32,mem_len=32)",dense]'],
    "dense": ["seq_len=256"],
}
"""Hashing and dropout; carried state; random features that are redrawn; a mixture; none of these."""
EVERYWHERE = [
    "data=files",
    "data.path=corpus.txt",
    "depth=1",
    "device=cpu",
    "measure=standard",
    "measure.time_seconds=0",
]
EVERYWHERE += ["measure.min_samples=1", "measure.eval_tokens=2048", "measure.checkpoint_seconds=0.05"]
STEPS = 200


class Sweep:
    """Cells in a process of their own; `folder` is also where it locks, and what it is found by."""

    def __init__(self, folder: Path, cells: list[str]) -> None:
        self.folder, self.cells = folder, cells
        (folder / "cells.py").write_text(SCRIPT)
        (folder / "corpus.txt").write_text(" ".join(map(str, range(10_000))))
        self.start("killed")

    def start(self, *names: str) -> None:
        """All cells in the experiment of each name."""
        overrides = []
        for name, variant in product(names, self.cells):
            tokens = STEPS * int(CELLS[variant][0].removeprefix("seq_len="))
            own = [f"variant={variant}", *CELLS[variant], f"measure.train_tokens={tokens}"]
            overrides.append([*EVERYWHERE, *own, f"results_dir={self.folder}", f"name={name}"])
        env = {**os.environ, "TMPDIR": str(self.folder)}
        command = [sys.executable, "cells.py", json.dumps(overrides)]
        self.process = subprocess.Popen(command, cwd=self.folder, env=env, stderr=subprocess.PIPE, text=True)

    def finish(self) -> str:
        """What it said."""
        if not self.process.stderr.closed:  # type: ignore[union-attr]
            _, self.said = self.process.communicate()
        return self.said

    def records(self, name: str) -> dict[str, Record]:
        """By variant."""
        found, problems = read_all(self.folder / name)
        assert not problems
        return {record.variant: record for record in found}

    def checkpoints(self) -> list[Path]:
        """Those that are left, oldest first."""
        found = (self.folder / "killed/checkpoints").glob("*.pt")
        return sorted(found, key=lambda path: path.stat().st_mtime)

    def wait_for_checkpoint(self, seen: set[Path]) -> None:
        """Until a cell that is not among those seen writes one."""

        def new() -> list[Path]:
            assert self.process.poll() is None, self.finish()
            return [path for path in self.checkpoints() if path not in seen]

        wait_until(new)
        seen.update(new())

    def cell_pid(self) -> int:
        """The process of the cell that runs: the server's child."""
        own = {int(p.parent.name) for p in Path("/proc").glob("[0-9]*/environ") if self._mine(p)}
        parents = {pid: int(stat.rpartition(") ")[2].split()[1]) for pid in own if (stat := _stat(pid))}
        (pid,) = (pid for pid, parent in parents.items() if parents.get(parent) == self.process.pid)
        return pid

    def _mine(self, environ: Path) -> bool:
        try:
            return f"TMPDIR={self.folder}".encode() in environ.read_bytes().split(b"\0")
        except OSError:  # ended meanwhile, or somebody else's
            return False

    def curve(self, name: str, record: Record) -> list[dict[str, str]]:
        """Without times."""
        text = records.curve_path_of(self.folder / name, record.cell_id).read_text()
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(text.splitlines())]


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""


@pytest.fixture
def sweep(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Sweep]:
    """In a folder with a short name: sockets need one."""
    started = Sweep(tmp_path_factory.mktemp("a"), request.param)
    yield started
    started.process.kill()
    started.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    "sweep",
    [["reformer", "hybrid"], [*CELLS]],
    indirect=True,
)
def test_cells_that_are_killed_go_on_to_the_same_result(sweep: Sweep) -> None:
    """First the whole sweep is killed at a random moment of a training, then the processes of the cells that
    follow; at last they finish, and the same cells are run through beside them."""
    first, *others = sweep.cells
    seen: set[Path] = set()
    sweep.wait_for_checkpoint(seen)
    sweep.process.kill()
    sweep.finish()
    assert not sweep.records("killed")

    sweep.start("killed")
    for _ in others:
        sweep.wait_for_checkpoint(seen)
        os.kill(sweep.cell_pid(), signal.SIGKILL)
    assert sweep.finish().count("training resumes after step") == 1
    statuses = {variant: record.status for variant, record in sweep.records("killed").items()}
    assert statuses == {first: "ok", **dict.fromkeys(others, "error")}
    assert len(sweep.checkpoints()) == len(others), "those of finished cells are removed"

    sweep.start("killed", "through")
    assert sweep.finish().count("training resumes after step") == len(others)
    killed, through = sweep.records("killed"), sweep.records("through")
    assert set(killed) == set(through) == set(sweep.cells)
    for got, want in ((killed[variant], through[variant]) for variant in sweep.cells):
        assert (got.status, want.status) == ("ok", "ok")
        assert got.nll == want.nll
        assert got.nll_by_position == want.nll_by_position
        assert got.tokens_trained == want.tokens_trained
        assert sweep.curve("killed", got) == sweep.curve("through", want)
        assert len(sweep.curve("through", want)) == STEPS
    assert not sweep.checkpoints()
