"""Every command ends in order where its output cannot be written: real processes, pipes and devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from many_records import write

from variants.safe_output import CLOSED_PIPE

FULL = Path("/dev/full")
slow = pytest.mark.slow

COMMANDS = [
    pytest.param(line, id=line, marks=marks)
    for line, *marks in (
        ("bench --help",),
        ("bench --hydra-help", slow),
        ("bench --cfg job",),
        ("bench --info searchpath", slow),
        ("variants", slow),
        ("variants --names",),
        ("variants --help", slow),
        ("bench.report --no-plots demo", slow),
        ("bench.report --help",),
        ("bench.records check demo",),
        ("bench.records compact demo",),
        ("bench.records --help", slow),
        ("bench.corpora show stdlib", slow),
        ("bench.corpora --help", slow),
        ("bench.tools.gallery --only dense", slow),
        ("bench.tools.gallery --help", slow),
        ("bench.claims demo", slow),
        ("bench.claims --help", slow),
        ("bench.tools.bench_layers --help",),
        ("bench.run.provenance preset", slow),
    )
]


def start(
    line: str, folder: Path, *, stdout: int | IO[bytes], stderr: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    """The command in a folder with an experiment of its own."""
    folder.mkdir(exist_ok=True)
    write(folder / "demo", 12)
    command = [sys.executable, "-m", *line.split(" ")]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


def closed_pipe() -> int:
    """The end of a pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("line", COMMANDS)
def test_a_closed_pipe_is_quiet_and_a_full_device_is_one_line(line: str, tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        writer = closed_pipe()
        left = start(line, tmp_path / "a", stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        stuck = start(line, tmp_path / "b", stdout=full, stderr=subprocess.PIPE)
        assert (left.communicate()[1].decode(), left.returncode) == ("", CLOSED_PIPE)
        message = b"error: the output cannot be written: No space left on device\n"
        assert (stuck.communicate()[1], stuck.returncode) == (message, 1)


MISTAKES = [
    "bench seq_len=x",
    "bench.records check nowhere",
    "bench.claims nowhere",
    "bench.tools.bench_layers --only nothing",
]


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_that_nobody_can_read_of_is_one_all_the_same(line: str, tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        writer = closed_pipe()
        left = start(line, tmp_path / "a", stdout=subprocess.PIPE, stderr=writer)
        os.close(writer)
        stuck = start(line, tmp_path / "b", stdout=subprocess.PIPE, stderr=full)
        closed = start(line, tmp_path / "c", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        expected = closed.communicate()[1]
    assert len(expected.splitlines()) == 1
    for process in (left, stuck, closed):
        output = process.communicate()[0] if process is not closed else b""
        assert (output, process.wait()) == (b"", 2)


def test_streams_that_are_closed_give_their_numbers_to_no_file(tmp_path: Path) -> None:
    """A record would otherwise get what is printed."""
    cell = ["data=stdlib", "measure=plan", "seq_len=32", "depth=1"]
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-m", "bench", *cell]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    again = [sys.executable, "-m", "bench", *cell]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "1 of 1 cells were finished before" in done.stderr
    assert done.stdout.startswith("ok ")
