"""Functions and commands with a time limit: what survives a crash, and what ends with them."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_SECONDS, wait_until

from bench.process.limited import run_limited
from bench.tools.gpu_report.command import run_command
from bench.tools.gpu_report.deadline import Deadline

Report = Callable[[Any], None]


def aborts(report: Report, how: str) -> None:
    """Report once, then end in one of the ways in which a kernel ends a process."""
    report("before")
    if how == "abort":
        os.abort()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exit":
        os._exit(3)
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access\nmore lines")
    if how == "hang":
        time.sleep(HANG_SECONDS)
    report("after")


@pytest.mark.parametrize(
    ("how", "raised", "says"),
    [
        ("abort", None, "killed by SIGABRT: test_limited.py"),
        ("kill", None, "killed by SIGKILL"),
        ("exit", None, "exit status 3"),
        ("raise", "RuntimeError", "CUDA error: an illegal memory access"),
        ("hang", None, "still running after 3 s"),
    ],
)
def test_what_was_reported_before_a_crash_is_kept(how: str, raised: str | None, says: str) -> None:
    outcome = run_limited(aborts, how, seconds=3 if how == "hang" else HANG_SECONDS)
    assert outcome.reported == ["before"] or how == "hang"
    assert outcome.raised == raised
    assert outcome.failure is not None
    assert outcome.failure.startswith(says)
    assert "\n" not in outcome.failure


def test_a_function_that_returns_has_no_failure() -> None:
    outcome = run_limited(aborts, "not at all", seconds=HANG_SECONDS)
    assert (outcome.reported, outcome.failure, outcome.raised) == (["before", "after"], None, None)


LOUD = "import sys; print('one'); print('two', file=sys.stderr); print(); sys.exit(3)"
CHILD = """
import os, signal, subprocess, sys, time
{handler}
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print(child.pid)
try:
    time.sleep(3600)
except KeyboardInterrupt:
    print("ended properly")
    sys.exit(130)
"""


def test_the_output_of_a_command_is_kept(tmp_path: Path) -> None:
    ran = run_command(
        [sys.executable, "-c", LOUD], log=tmp_path / "logs/x.txt", seconds=60, cwd=tmp_path, environment={}
    )
    assert (ran.status, ran.in_time, ran.last_line) == (3, True, "two")
    assert (tmp_path / "logs/x.txt").read_text() == ran.output == "one\ntwo\n\n"


@pytest.mark.parametrize(
    ("handler", "status"),
    [("", 130), ("signal.signal(signal.SIGINT, signal.SIG_IGN)", -signal.SIGKILL)],
    ids=["heeds SIGINT", "ignores it"],
)
def test_a_command_out_of_time_ends_with_what_it_has_started(
    handler: str, status: int, tmp_path: Path
) -> None:
    script = CHILD.format(handler=handler)
    command = [sys.executable, "-c", script]
    ran = run_command(command, log=tmp_path / "x.txt", seconds=3, cwd=tmp_path, environment={}, grace=1)
    assert (ran.status, ran.in_time) == (status, False)
    assert ("ended properly" in ran.output) == (status == 130)
    child = int(ran.output.split()[0])
    wait_until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text())


def test_time_that_a_part_does_not_use_is_left_for_later_ones() -> None:
    now = [100.0]
    deadline = Deadline(1000.0, clock=lambda: now[0])
    assert deadline.part(0.2) == 200
    now[0] += 50
    assert deadline.left() == 950
    assert deadline.left(reserve=100) == 850
    assert deadline.part(0.2) == 200
    now[0] += 800
    assert deadline.part(0.2) == 150
    assert deadline.part(0.2, reserve=100) == 50
    now[0] += 200
    assert deadline.left() == deadline.part(0.2) == 0
