"""A report replaces the one before when it is whole; until then, and if it never is, the old one stays."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import many_records
import pytest
from conftest import HANG_SECONDS, wait_until

from bench.report import build, compare


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.report", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def whole(report: Path) -> None:
    """Every picture that the summary shows is there."""
    shown = re.findall(r"\]\((plots/[^)]+)\)", (report / "summary.md").read_text())
    assert shown
    for name in shown:
        assert (report / name).is_file()


def hidden(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    many_records.write(tmp_path / "many", 10)
    return tmp_path / "many"


def interrupted(folder: Path, number: signal.Signals) -> tuple[subprocess.Popen[str], str]:
    """A process that builds a report, ended by a signal while it draws, and what it said."""
    builder = start(folder)
    wait_until(lambda: list(folder.glob(".report-*.tmp/plots")) or builder.poll() is not None)
    builder.send_signal(number)
    return builder, builder.communicate(timeout=HANG_SECONDS)[1]


def test_an_interrupted_report_leaves_the_old_one_as_it_was(folder: Path) -> None:
    report = build(folder)
    (report / "notes.txt").write_text("a person's own")
    before = tree(report)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        builder, said = interrupted(folder, number)
        while builder.returncode == 0:  # on a busy machine the report may be done before the signal
            before = tree(report)
            builder, said = interrupted(folder, number)
        assert tree(report) == before
        if number == signal.SIGKILL:
            assert builder.returncode == -number
        else:
            assert builder.returncode == 128 + number
            assert said == f"bench.report: stopped by {number.name}; the report is as it was before\n"
            assert not hidden(folder)
    assert hidden(folder), "what a killed one left"
    build(folder, plots=False)
    assert not hidden(folder), "the next one removes"
    assert (report / "notes.txt").exists()
    assert not list((report / "plots").iterdir()), "no picture outlives its report"


def test_a_report_that_fails_leaves_the_old_one_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build(folder, plots=False)
    against = compare(folder, folder, plots=False)
    before = tree(report)
    monkeypatch.setattr("bench.report.page.html", lambda *_: 1 / 0)
    monkeypatch.setattr("bench.report.comparison.tables.text", lambda *_: 1 / 0)
    for again in (lambda: build(folder, plots=False), lambda: compare(folder, folder, plots=False)):
        with pytest.raises(ZeroDivisionError):
            again()
    assert tree(report) == before
    assert against.is_relative_to(report)
    assert not hidden(folder)


@pytest.mark.slow
def test_two_reports_at_once_leave_a_whole_one(folder: Path) -> None:
    builders = [start(folder) for _ in range(2)]
    said = [builder.communicate(timeout=HANG_SECONDS)[1] for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], said
    whole(folder / "report")
    assert not hidden(folder)
