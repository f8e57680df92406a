"""The report of a GPU: its page from the output of other programs, and the whole command on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS

from bench import corpora
from bench.run import isolate
from bench.run.devices import CPU
from bench.tools.gpu_report import environment, page
from bench.tools.gpu_report.command import Ran
from bench.tools.gpu_report.deadline import Deadline
from bench.tools.gpu_report.page import Part, PytestResults
from bench.tools.gpu_report.parts import PARTS, PLANS, GpuReport

ROOT = Path(__file__).parents[1]
OUTPUT = """\
collected 3 items
tests/test_cuda.py::test_one[a b-1] PASSED                               [ 33%]
tests/test_cuda.py::test_two FAILED                                      [ 66%]
tests/test_cuda.py::test_three SKIPPED (no kernel)                       [100%]
FAILED tests/test_cuda.py::test_two - RuntimeError: no kernel image
ERROR tests/test_other.py - ImportError: no module
"""
PARALLEL = """\
[gw1] [ 33%] PASSED tests/test_cuda.py::test_one[a b-1]
[gw0] [ 66%] FAILED tests/test_cuda.py::test_two
[gw1] [100%] SKIPPED tests/test_cuda.py::test_three
FAILED tests/test_cuda.py::test_two - RuntimeError: no kernel image
ERROR tests/test_other.py - ImportError: no module
"""


def results_of(*runs: Ran) -> PytestResults:
    found = PytestResults()
    for ran in runs:
        found.add(ran)
    return found


@pytest.mark.parametrize("output", [OUTPUT, PARALLEL], ids=["one process", "several"])
def test_results_of_tests_are_read_from_their_lines(output: str) -> None:
    found = results_of(Ran(1, True, 60.0, output))
    assert found.results == {
        "tests/test_cuda.py::test_one[a b-1]": "PASSED",
        "tests/test_cuda.py::test_two": "FAILED",
        "tests/test_cuda.py::test_three": "SKIPPED",
        "tests/test_other.py": "ERROR",
    }
    assert found.lines() == [
        "1 error, 1 failed, 1 passed, 1 skipped",
        "- `tests/test_cuda.py::test_two`: RuntimeError: no kernel image",
        "- `tests/test_other.py`: ImportError: no module",
    ]
    assert found.lines(1)[1:] == [found.lines()[1], "- … 1 more in tests.md"]


def test_a_test_that_ran_again_has_its_new_result() -> None:
    again = "tests/test_cuda.py::test_two PASSED [100%]\n"
    found = results_of(Ran(1, True, 60.0, OUTPUT), Ran(0, True, 5.0, again))
    assert found.failed == ["tests/test_other.py"]


def test_tests_that_are_stopped_or_cannot_start_are_told_of() -> None:
    stopped = OUTPUT.splitlines()[1] + "\n"
    found = results_of(Ran(2, False, 90.0, stopped), Ran(4, True, 1.0, "No module named pytest\n"))
    assert found.lines() == [
        "1 passed",
        "stopped after 1:30; the remaining tests did not run",
        "pytest ended with status 4: No module named pytest",
    ]
    assert not found.failed
    assert found.is_broken


def test_the_files_with_tests_for_a_device_are_found() -> None:
    names = {Path(path).name for path in page.files_with_marker(ROOT / "tests", "mark.cuda")}
    assert {"test_cuda.py", "test_device_time.py"} <= names
    assert "test_words.py" not in names
    assert page.files_with_marker(ROOT / "no such folder", "mark.cuda") == []


def test_required_packages_are_those_of_the_project() -> None:
    names = environment.requirements(ROOT / "pyproject.toml")
    assert {"torch", "hydra-core", "vl-convert-python"} <= {*names}
    versions = environment.packages([*names, "no-such-package"])
    assert versions.pop("no-such-package") is None
    assert all(versions.values())


def test_the_page_says_what_did_not_run_and_what_to_commit(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records/a.json").write_text("x" * 2 * page.LARGE_BYTES)
    (tmp_path / "impls.md").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    parts = [Part("One", 61.0, True, lines=["fine"]), Part("Two")]
    text = page.first_page(tmp_path, {"device": "a|b"}, parts)
    assert "## One\n\nfine\n\nTook 1:01." in text
    assert "## Two (not complete)\n\ndid not run" in text
    assert "| device | a\\|b |" in text
    assert "- `records`: 1 file, 2.00 MiB" in text
    assert "large: `records/a.json`" in text
    assert "checkpoints" not in text


def test_a_later_run_of_some_parts_keeps_the_others(tmp_path: Path) -> None:
    """A machine may be lent for a few minutes at a time."""
    path = tmp_path / "parts.json"
    assert page.read_parts(path) == ({}, {})
    parts = {"host": Part("Host", 2.0, True, lines=["37 µs"])}
    page.write_parts(path, {"torch": "2"}, parts)
    assert page.read_parts(path) == ({"torch": "2"}, parts)
    plan, deadline = PLANS["cpu"], Deadline(600.0)
    report = GpuReport(CPU, plan, tmp_path, deadline, ["dense"], ["environment", "tests"])
    assert report.parts["host"] == parts["host"]
    assert report.parts["tests"] == Part("Tests on the device")
    assert report._share("tests", 0.15) == pytest.approx(600, abs=5), "no later part needs time"
    whole = GpuReport(CPU, plan, tmp_path, deadline, ["dense"], list(PARTS))
    assert whole._share("tests", 0.15) == pytest.approx(90)
    report.write()
    assert "37 µs" in (tmp_path / "gpu-report.md").read_text()


def test_make_bench_trains_on_the_best_corpus_unless_one_is_given() -> None:
    bench = ["make", "-n", "bench", "EXPERIMENT=gpu"]
    says = [
        subprocess.run([*bench, *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for more in ([], ["ARGS=data=stdlib"])
    ]
    assert ["bench.corpora best" in text for text in says] == [True, False]


def test_the_best_corpus_is_the_first_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    at_hand: set[str] = set()

    def load(name: str) -> None:
        if name not in at_hand:
            raise corpora.CorpusError(f"{name}: missing")

    monkeypatch.setattr(corpora, "load", load)
    with pytest.raises(corpora.CorpusError, match="enwik8: missing; plays: missing; stdlib: missing"):
        corpora.best()
    for name in reversed(corpora.BEST):
        at_hand.add(name)
        assert corpora.best() == name


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--device cuda", "this machine has no CUDA device"),
        ("--device cpu --minutes 0", "--minutes=0: allowed is more than 0"),
        ("--device cpu --only longfromer", "did you mean longformer?"),
        ("--device cpu --parts imps", "did you mean impls?"),
        ("--device tpu", "--device=tpu: unknown; allowed are"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(arguments: str, says: str, tmp_path: Path) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    line = [sys.executable, "-m", "bench.tools.gpu_report", *arguments.split(), "--out", "x"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_whole_command_on_the_cpu(tmp_path: Path) -> None:
    """Tests, implementations and a preset, in small sizes."""
    line = [
        sys.executable,
        "-m",
        "bench.tools.gpu_report",
        "--device",
        "cpu",
        "--only",
        "dense",
        "chunked",
    ]
    line += ["--minutes", "600", "--out", "results/here"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "results/here"
    text = (folder / "gpu-report.md").read_text()
    assert "not complete" not in text
    assert "passed" in text
    assert "dense impl=naive" in text
    assert "data: " in text
    assert (folder / "report/summary.md").exists()
    cases = json.loads((folder / "impls.json").read_text())["cases"]
    assert {case["variant"] for case in cases} == {"dense", "chunked"}
    assert all(len(case["figures"]) == 2 for case in cases if case["is_auto"])
    assert len([*(folder / "records").glob("*.json")]) > 3


@pytest.mark.slow
def test_the_command_ends_when_its_time_is_over(tmp_path: Path) -> None:
    """With what it has: a page, and no record of the cell that was stopped."""
    line = [sys.executable, "-m", "bench.tools.gpu_report", "--device", "cpu", "--only", "dense"]
    line += ["--minutes", "0.02", "--out", "results/here"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results/here/gpu-report.md").read_text()
    assert text.count("did not run: no time was left") == 2, "the tests and the preset"
    assert "dense impl=naive: not tried" in text
    assert isolate.STOPPED not in text
