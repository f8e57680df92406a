"""Sweeps that are killed, stopped, started twice at once or short of memory: real processes and signals."""

from __future__ import annotations

import json
import os
import pty
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.records import FINAL, Record

CELL = ["depth=1", "model.d_model=16", "data=files", "data.path=corpus.txt", "seq_len=16"]
WAIT_SECONDS = 900


class Sweep:
    """`python -m bench -m` in a folder, in a process and a session of its own."""

    def __init__(self, folder: Path, *overrides: str, stderr: int = subprocess.DEVNULL) -> None:
        self.folder = folder
        (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
        # TMPDIR holds the lock of the device; ignored signals would be inherited
        env = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench", "-m", *CELL, *overrides],
            cwd=folder,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def kill(self) -> None:
        """As the system does when it has no memory left."""
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        """Wait for the end; what was written to stderr."""
        _, errors = self.process.communicate(timeout=WAIT_SECONDS)
        return errors or ""

    def cells(self) -> list[int]:
        """The processes of cells: what the server that they start from has started."""
        servers = children(self.process.pid)
        return [cell for server in servers for cell in children(server)]


def heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def texts(folder: Path) -> dict[str, str]:
    """The cells whose records are final, and the records as they stand in their files."""
    found = {path.stem: path.read_text() for path in folder.glob("results/adhoc/records/*.json")}
    return {cell: text for cell, text in found.items() if ended(text)}


def ended(text: str) -> bool:
    try:
        return records.parse(text).status in FINAL
    except records.RecordError:
        return False


def known(folder: Path) -> list[Record]:
    found, problems = records.read_all(folder / "results/adhoc")
    assert not problems
    return found


def in_turn(found: list[Record]) -> bool:
    """Whether no two cells ran at the same time."""
    spans = sorted((str(record.started_at), str(record.ended_at)) for record in found)
    return all(start <= end for start, end in spans) and all(a[1] <= b[0] for a, b in pairwise(spans))


def killed_and_resumed(folder: Path, *, cells: int, kills: int, seed: int) -> None:
    """Kill a sweep at random moments and start it again each time, at last twice at once; check everything."""
    draw = random.Random(seed)
    overrides = ["measure=plan", f"replicate=range({cells})"]
    final: dict[str, str] = {}
    for _ in range(kills):
        sweep = Sweep(folder, *overrides)
        more = len(final) + draw.randint(0, 2 * cells // (3 * kills))
        wait_until(lambda: len(texts(folder)) >= more or sweep.process.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0, 1.0))
        sweep.kill()
        now = texts(folder)
        assert final.items() <= now.items(), "what is final is neither lost nor measured again"
        final = now
    assert 0 < len(final) < cells, "it was killed with some cells done and some to do"

    torn, emptied = sorted(final)[:2]
    for cell, content in ((torn, final.pop(torn)[:200]), (emptied, ""), ("f" * 16, "{")):
        (folder / f"results/adhoc/records/{cell}.json").write_text(content)
    final.pop(emptied)
    both = [Sweep(folder, *overrides, stderr=subprocess.PIPE) for _ in range(2)]
    wait_until(lambda: any(sweep.cells() for sweep in both))
    said = [sweep.end() for sweep in both]
    assert [sweep.process.returncode for sweep in both] == [0, 0], said
    (folder / "results/adhoc/records" / f"{'f' * 16}.json").unlink()  # foreign: named, skipped and left alone
    found = known(folder)
    assert len(found) == cells
    assert {record.replicate for record in found} == set(range(cells))
    assert {record.status for record in found} == {"ok"}
    assert final.items() <= texts(folder).items()
    assert in_turn(found)
    measured = [line for errors in said for line in errors.splitlines() if line.startswith("[")]
    new = [line for line in measured if "by another sweep" not in line]
    assert len(new) == cells - len(final), "each cell was measured by one of the two"
    assert not [*folder.rglob("*.tmp")]


def test_a_sweep_that_is_killed_goes_on_and_two_at_once_share_it(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, cells=24, kills=4, seed=1)


@pytest.mark.slow
def test_200_cells_survive_20_kills(tmp_path: Path) -> None:
    killed_and_resumed(tmp_path, cells=200, kills=20, seed=2)
