"""Trackers are told what the record says, read back from their own local stores."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS, wait_until
from test_report import record

from bench import trackers
from bench.records import Record, curve_path_of
from bench.trackers import TrackerSpec

ROOT = Path(__file__).parents[1]
CURVE = "step,tokens,seconds,learning_rate,nll\n1,64,0.5,0.001,5.5\n2,128,1.0,0.003,4.25\n"


@pytest.fixture
def told(tmp_path: Path) -> tuple[Path, Record]:
    """An experiment's folder with the curve of a cell, and its record."""
    cell = record("longformer", learning_rate=0.003, variant_params={"window": 64})
    path = curve_path_of(tmp_path / "demo", cell.cell_id)
    path.parent.mkdir(parents=True)
    path.write_text(CURVE)
    return tmp_path / "demo", cell


def test_figures_and_settings_share_no_key_and_leave_out_no_number() -> None:
    cell = record(
        "longformer", learning_rate=0.003, variant_params={"window": 64}, data_params={"n_pairs": 4}
    )
    asked, found = trackers.settings(cell), trackers.figures(cell)
    assert not set(asked) & set(found)
    assert asked["variant.window"] == "64"
    assert asked["data.n_pairs"] == "4"
    assert asked["learning_rate"] == "0.003"
    assert found["nll"] == cell.nll
    assert found["peak_bytes"] == cell.peak_bytes
    assert "cpu_model" not in found


def test_none_is_the_default_and_writes_nothing(told: tuple[Path, Record]) -> None:
    folder, cell = told
    before = sorted(folder.parent.rglob("*"))
    trackers.log(TrackerSpec(), folder, cell)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_tracker_that_fails_costs_a_line(
    told: tuple[Path, Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="the extra `trackers` is not installed")
    folder, cell = told
    (tmp_path / "file").write_text("")
    trackers.log(TrackerSpec(name="tensorboard", place=str(tmp_path / "file")), folder, cell)
    said = capsys.readouterr().err
    assert said.startswith(f"tracker=tensorboard: failed to log {cell.cell_id}: ")
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("default")  # theirs to fix
def test_tensorboard_reads_back_what_it_was_told(told: tuple[Path, Record]) -> None:
    pytest.importorskip("tensorboard", reason="the extra `trackers` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, cell = told
    trackers.log(TrackerSpec(name="tensorboard"), folder, cell)
    (run,) = (folder.parent / "tensorboard" / "demo").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    expected = trackers.figures(cell)
    scalars = {tag for tag in events.Tags()["scalars"] if tag.startswith("record/")}
    assert scalars == {f"record/{key}" for key in expected}
    for key, value in expected.items():
        assert events.Scalars(f"record/{key}")[0].value == pytest.approx(value, rel=1e-6)
    curve = [(event.step, event.value) for event in events.Scalars("training/nll")]
    assert curve == [(1, 5.5), (2, 4.25)]


@pytest.mark.filterwarnings("default")  # theirs to fix
def test_mlflow_reads_back_what_it_was_told(told: tuple[Path, Record]) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra `trackers` is not installed")
    folder, cell = told
    for _ in range(2):  # the second finds the experiment
        trackers.log(TrackerSpec(name="mlflow"), folder, cell)
    client = mlflow.MlflowClient(tracking_uri=(folder.parent / "mlflow").as_uri())
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert len(runs) == 2
    for run in runs:
        assert run.data.params == trackers.settings(cell)
        assert run.data.metrics.items() >= trackers.figures(cell).items()
        assert run.data.tags["cell_id"] == cell.cell_id
        assert run.info.status == "FINISHED"
        curve = client.get_metric_history(run.info.run_id, "training.nll")
        assert [(point.step, point.value) for point in curve] == [(1, 5.5), (2, 4.25)]


def entries_of(path: Path) -> Iterator[bytes]:
    """The entries of a file of Weights & Biases: after a header of 7 bytes, blocks of 32 KiB of pieces, each
    with a checksum, its length, and whether it is whole, the first, a middle or the last of an entry."""
    data, at, entry = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return  # still being written
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry
            entry = b""


@pytest.mark.filterwarnings("default")  # theirs to fix
def test_wandb_wrote_what_it_was_told(told: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """From its local file; no network is used."""
    pytest.importorskip("wandb", reason="the extra `trackers` is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder, cell = told
    trackers.log(TrackerSpec(name="wandb"), folder, cell)
    (path,) = (folder.parent / "wandb").rglob("*.wandb")
    record = wandb_internal_pb2.Record
    # a process of its own writes the file, on a busy machine after the run was finished
    wait_until(lambda: any(record.FromString(data).HasField("exit") for data in entries_of(path)))
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    curve: list[tuple[int, float]] = []
    for data in entries_of(path):
        entry = record.FromString(data)
        if entry.HasField("run"):
            assert (entry.run.project, entry.run.display_name) == ("demo", "longformer T=512 #0")
            config |= {item.key: json.loads(item.value_json) for item in entry.run.config.update}
        for item in entry.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        step = entry.history.step.num
        row = {
            ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in entry.history.item
        }
        if "training/nll" in row:
            curve.append((step, row["training/nll"]))
    assert config.items() >= trackers.settings(cell).items()
    assert summary.items() >= trackers.figures(cell).items()
    assert (summary["cell_id"], summary["status"]) == (cell.cell_id, "ok")
    assert curve == [(1, 5.5), (2, 4.25)]


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_runs(name: str, tmp_path: Path) -> None:
    """Whatever is installed here: in a process that cannot find it."""
    blind = (
        "NAMES = ('mlflow', 'tensorboard', 'wandb')\n"
        "import importlib.util, sys; real = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n in NAMES else real(n, *a)\n"
        "from bench.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", blind, f"tracker={name}", f"results_dir={tmp_path / 'r'}", "measure=plan"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: tracker={name}: needs the package {name}; pip install 'longctx-bench[trackers]'\n"
    )
    assert not (tmp_path / "r").exists()
