"""Where a sweep cannot print, all is measured and recorded as ever: no screen is worth a measurement."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG_SECONDS, wait_until
from test_sweep import CELL, apart, children, heed_signals
from tiers import slow

from bench.records import read_all

SWEEP = [*CELL, "measure=plan", "replicate=0,1"]
ONE = [*CELL, "measure=plan"]


def bench(folder: Path, redirection: str, *arguments: str) -> int:
    """The exit status of `python -m bench` behind a shell's redirections."""
    (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    command = ["sh", "-c", f'exec "$0" -m bench "$@" {redirection}', sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=apart(folder), timeout=HANG_SECONDS).returncode


def statuses(folder: Path) -> list[str]:
    found, problems = read_all(folder / "results/adhoc")
    assert not problems
    return [record.status for record in found]


@pytest.mark.parametrize(
    "redirection",
    [
        ">&- 2>&- <&-",
        ">/dev/full 2>/dev/full",
        *slow(
            "2>/dev/full >/dev/null",
            "2>&- >/dev/null",
            ">/dev/full 2>/dev/null",
            ">&- 2>/dev/null",
        ),
    ],
)
@pytest.mark.parametrize(
    "cells", [pytest.param(1, id="cell", marks=pytest.mark.slow), pytest.param(2, id="sweep")]
)
def test_what_cannot_be_printed_stops_nothing(redirection: str, cells: int, tmp_path: Path) -> None:
    arguments = ONE if cells == 1 else ["-m", *SWEEP]
    assert bench(tmp_path, redirection, *arguments) == 0
    assert statuses(tmp_path) == ["ok"] * cells
    for path in tmp_path.glob("results/adhoc/records/*"):
        json.loads(path.read_text())  # whole: no library's words went into a file that took stderr's number


@pytest.mark.parametrize("stream", ["stderr", *slow("stdout")])
@pytest.mark.parametrize("arguments", [["-m", *SWEEP], *slow(ONE)], ids=["sweep", "cell"])
@pytest.mark.slow
def test_a_reader_that_has_gone_stops_nothing(stream: str, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: writing}
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=tmp_path, env=apart(tmp_path), **streams
    )
    os.close(writing)
    assert done.returncode == 0
    assert statuses(tmp_path) == ["ok"] * (2 if "-m" in arguments else 1)


@pytest.mark.parametrize("redirection", ["2>&-", *slow("2>/dev/full")])
def test_a_failure_has_its_status_though_nobody_hears_of_it(redirection: str, tmp_path: Path) -> None:
    assert bench(tmp_path, f"{redirection} >/dev/null", *ONE, "seq_len=0") == 2
    diverges = ["measure=quick", "measure.time_seconds=0", "measure.train_tokens=60000"]
    diverges += ["measure.eval_tokens=16", "measure.learning_rate=1e25"]
    assert bench(tmp_path, f"{redirection} >/dev/null", *CELL, *diverges) == 1
    assert statuses(tmp_path) == ["diverged"]


@pytest.mark.parametrize("ignored", [False, *slow(True)], ids=["", "nohup"])
def test_a_terminal_that_closes(ignored: bool, tmp_path: Path) -> None:
    """It ends the sweep as SIGTERM does, with the cells that are finished kept; under nohup it goes on."""
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    cells = 4 if ignored else 60
    pid, terminal = pty.fork()
    if not pid:
        heed_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.chdir(tmp_path)
        arguments = ["-m", *CELL, "measure=plan", f"replicate=range({cells})"]
        os.execve(sys.executable, [sys.executable, "-m", "bench", *arguments], apart(tmp_path))
    wait_until(lambda: list(tmp_path.glob("results/adhoc/records/*.json")))
    servers = children(pid)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    found = statuses(tmp_path)
    if ignored:
        assert os.waitstatus_to_exitcode(status) == 0
        assert found == ["ok"] * cells
    else:
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
        assert set(found) <= {"ok", "error"}
        assert 1 <= found.count("ok") < cells
        assert found.count("error") <= 1, "the cell in hand"
    wait_until(lambda: not any(Path(f"/proc/{server}").exists() for server in servers))
