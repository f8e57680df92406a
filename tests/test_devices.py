"""A sweep uses all devices of a machine, one cell on each. Two stand-ins play the devices; the sweep, its
threads and its cells are those of `python -m bench`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS, wait_until

from bench import records
from bench.run.devices import CPU, CUDA_VARIABLE, HIP_VARIABLE, Device, devices_of, selection

STAND_INS = """
import os, sys
from pathlib import Path
from bench.run import sweep
from bench.run.devices import Device

class Card(Device):
    def select(self):
        super().select()
        Path("cards", str(os.getpid())).write_text(os.environ["CARD"])

sweep.devices_of = lambda kind: tuple(Card("cpu", f"card-{n}", "CARD", str(n)) for n in range(2))
"""
RUN = "import sys, stand_ins; from bench.__main__ import main; sys.exit(main())"
CELL = ["seq_len=16", "depth=1", "model.d_model=16", "data=files", "data.path=corpus.txt"]
CELL += ["measure=quick", "remeasure=false"]


class Sweep:
    """A sweep with two stand-ins for devices."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        (folder / "cards").mkdir()
        (folder / "stand_ins.py").write_text(STAND_INS)
        (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
        path = f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        own = {"TMPDIR": str(folder), "LONGCTX_BENCH_LOCKS": folder.name[:40], "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, "-m", *CELL, *overrides],
            cwd=folder,
            env={**os.environ, **own},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        )

    def cards(self) -> list[str]:
        """The devices that the processes of cells have selected."""
        return sorted(path.read_text() for path in (self.folder / "cards").iterdir())

    def end(self) -> str:
        """Wait for the end; returns what was written to stderr."""
        return self.process.communicate(timeout=HANG_SECONDS)[1]

    def records(self) -> list[records.Record]:
        found, problems = records.read_all(self.folder / "results/adhoc")
        assert not problems
        return found


@pytest.mark.slow
def test_two_devices_measure_two_cells_at_once_and_a_signal_ends_both(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "replicate=range(4)", "measure.time_seconds=100000")
    try:
        wait_until(lambda: sweep.cards() == ["0", "1"] or sweep.process.poll() is not None)
        sweep.process.terminate()
        errors = sweep.end()
    finally:
        sweep.process.kill()
    assert sweep.process.returncode == 128 + signal.SIGTERM, errors
    assert sweep.cards() == ["0", "1"], "no other cell begins"
    reasons = {record.reason for record in sweep.records()}
    assert reasons == {"stopped by a signal to the sweep before it ended"}
    assert len(sweep.records()) == 2


@pytest.mark.parametrize(("devices", "used"), [("all", {"0", "1"}), ("1", {"0"})])
def test_each_cell_is_measured_once(devices: str, used: set[str], tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "replicate=range(4)", "measure.time_seconds=0.3", f"devices={devices}")
    errors = sweep.end()
    assert sweep.process.returncode == 0, errors
    assert [record.status for record in sweep.records()] == ["ok"] * 4
    assert len(sweep.cards()) == 4
    assert {*sweep.cards()} == used
    counts = [line.split("]")[0] for line in errors.splitlines() if line.startswith("[")]
    assert counts == [f"[{n}/4" for n in range(1, 5)]


def test_a_machine_has_at_least_one_device_of_each_kind() -> None:
    assert devices_of("cpu") == (CPU,)
    assert {device.kind for device in devices_of("cuda")} == {"cuda"}


def test_selecting_a_device_hides_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUDA_VARIABLE, "0,1")
    CPU.select()
    assert os.environ[CUDA_VARIABLE] == "0,1"
    Device("cuda", "GPU-b", CUDA_VARIABLE, "1").select()
    assert os.environ[CUDA_VARIABLE] == "1"


@pytest.mark.parametrize(
    ("given", "is_hip", "expected"),
    [
        ({}, False, (CUDA_VARIABLE, ["0", "1"])),
        ({CUDA_VARIABLE: "3,1"}, False, (CUDA_VARIABLE, ["3", "1"])),
        ({CUDA_VARIABLE: "GPU-8f3, MIG-2c1"}, False, (CUDA_VARIABLE, ["GPU-8f3", "MIG-2c1"])),
        ({HIP_VARIABLE: "7,6"}, False, (CUDA_VARIABLE, ["0", "1"])),
        ({}, True, (HIP_VARIABLE, ["0", "1"])),
        ({HIP_VARIABLE: "7,6", CUDA_VARIABLE: "7,6"}, True, (HIP_VARIABLE, ["7", "6"])),
        ({CUDA_VARIABLE: "7,6"}, True, (CUDA_VARIABLE, ["7", "6"])),
    ],
)
def test_a_selection_of_the_user_s_is_divided(
    given: dict[str, str],
    is_hip: bool,
    expected: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (CUDA_VARIABLE, HIP_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert selection(2, is_hip=is_hip) == expected
