"""`import longctx_bench`: cells, sweeps, plans, records and reports from Python, as users write it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS
from report_parts import write
from test_report import record

import longctx_bench
from bench.inputs.errors import ConfigError
from bench.records import Record

QUICK: dict[str, Any] = {
    "seq_len": 32,
    "depth": 1,
    "device": "cpu",
    "measure": "quick",
    "measure.time_seconds": 0,
    "measure.min_samples": 1,
}


def python(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=HANG_SECONDS
    )


SCRIPT = """
import longctx_bench

print("top of the script")
record = longctx_bench.run(variant="chunked", objective="clm", **{**QUICK, "variant.chunk": 8})
print(record.status, record.seq_len, record.variant_params["chunk"], record.step_seconds_median > 0)
"""


@pytest.mark.slow
def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """Its processes do not run it again."""
    (tmp_path / "mine.py").write_text(SCRIPT.replace("QUICK", repr(QUICK)))
    done = python("mine.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["top of the script", "ok 32 8 True"]


@pytest.mark.slow
def test_it_works_from_a_notebook(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(SCRIPT.replace("QUICK", repr(QUICK)))]
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(o["text"] for o in notebook.cells[0].outputs if o.get("name") == "stdout")
    assert printed.splitlines() == ["top of the script", "ok 32 8 True"]


def test_both_forms_of_a_sweep_find_the_same_cells(tmp_path: Path) -> None:
    shared = {"depth": 1, "measure": "plan", "results_dir": tmp_path, "name": "2024_11_26"}
    cells = [{"variant": variant, "seq_len": n} for variant in ("dense", "chunked") for n in (32, 64)]
    first = longctx_bench.sweep(["variant=dense,chunked", "seq_len=32,64"], **shared)
    again = longctx_bench.sweep(cells, **shared)
    assert list(first["cell_id"]) == list(again["cell_id"])
    assert list(first["ended_at"]) == list(again["ended_at"])
    assert set(zip(first["variant"], first["seq_len"], strict=True)) == {
        (variant, seq_len) for variant in ("dense", "chunked") for seq_len in (32, 64)
    }
    folder = tmp_path / "2024_11_26"
    assert len(longctx_bench.load(folder)) == 4
    assert (longctx_bench.report(folder) / "index.html").is_file()


def test_a_preset_is_a_sweep(tmp_path: Path) -> None:
    knobs = {"results_dir": tmp_path, "measure": "plan", "variant": "dense", "seq_len": 32, "depth": 1}
    frame = longctx_bench.sweep(["experiment=smoke"], **knobs)
    assert set(frame["name"]) == {"smoke"}
    with pytest.raises(ConfigError, match=r"write sweep\(\['experiment=smoke'\]\)"):
        longctx_bench.run(experiment="smoke")


def test_a_plan_runs_nothing(tmp_path: Path) -> None:
    record = longctx_bench.plan(variant="dense", seq_len=2**16, results_dir=tmp_path)
    assert (record.status, record.step_seconds_median) == ("ok", None)
    assert record.peak_bytes_source is not None
    assert "predicted" in record.peak_bytes_source


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"variant": "longfromer"}, "did you mean longformer"),
        ({"sequence": 3}, "sequence: unknown knob"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"variant": "dense,chunked"}, "variant='dense,chunked': allowed is one of"),
        ({"variant": {"chunk": 3}}, "allowed are numbers, text, None, and lists"),
        ({"name": "${oc.env:HOME}"}, "must be plain"),
        ({"hydra/launcher": "submitit_local"}, "hydra"),
    ],
)
def test_a_mistake_is_one_line(knobs: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        longctx_bench.sweep([knobs] if "hydra/launcher" not in knobs else ["hydra/launcher=submitit_local"])
    assert "\n" not in str(refusal.value)


def test_values_are_those_of_python() -> None:
    """Text is not converted, whatever it looks like."""
    for name in ("1e3", "true", "null", "a'b", r"back\slash", "ünï", "[1,2]", "a,b"):
        assert longctx_bench._cell([f"name={longctx_bench._text('name', name)}"]).name == name
    cell = longctx_bench._cell(
        longctx_bench._lines({"measure.search_rates": (0.001, 0.01), "measure.budget": None, "force": True})
    )
    assert cell.spec.measure.search_rates == (0.001, 0.01)
    assert (cell.spec.measure.budget, cell.force) == (None, True)


@pytest.mark.parametrize("file", ["bench.py", "variants/__init__.py"])
def test_another_module_of_the_same_name_is_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine = True\n")
    done = python("-c", "import longctx_bench", cwd=tmp_path)
    assert f"{tmp_path / file} is found first; rename" in done.stderr.splitlines()[-1]


def test_records_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        longctx_bench.load(tmp_path / "none")
    write(tmp_path / "x", [record("dense", cell_id="a"), record("chunked", cell_id="b")])
    (tmp_path / "x/records/b.json").write_text('{"cell_id": ')
    with pytest.warns(UserWarning, match=r"left out: .*b\.json"):
        frame = longctx_bench.load(tmp_path / "x")
    assert list(frame["variant"]) == ["dense"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["variants", "--names"], "longformer"),
        (["--help"], "Knobs (knob=value"),
        (["--version"], f"longctx-bench {version('longctx-bench')}"),
        (["report", "--help"], "usage"),
    ],
)
def test_the_console_script_runs_the_commands(arguments: list[str], expected: str, tmp_path: Path) -> None:
    script = "import sys; from longctx_bench.command import main; sys.argv[0] = 'longctx-bench'; main()"
    done = python("-c", script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_the_script_ends_with_the_status_of_its_command(tmp_path: Path) -> None:
    script = "from longctx_bench.command import main; main()"
    done = python("-c", script, "variant=longfromer", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_the_caller_s_streams_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sys.stdout, sys.stderr
    record = longctx_bench.plan(variant="dense", seq_len=32, results_dir="results")
    assert isinstance(record, Record)
    assert (sys.stdout, sys.stderr) == before
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
