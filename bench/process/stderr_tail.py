"""What a cell's process writes to stderr, by Python or by C, down to its last words.

All of it goes on to this process's stderr as it comes. The end of it is kept, and where the cell did not
finish it is left beside the records.
"""

from __future__ import annotations

import codecs
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bench.records import write_atomically

LOGS_DIR = "logs"
TAIL_BYTES = 2**14
SAY_WHERE = signal.SIGUSR1
"""At this signal a cell's process writes where each of its threads is."""
ANSWER_SECONDS = 2.0
"""Longest wait for that."""
_CRASH_SITE = re.compile(r'^Current thread .*\n\s+File "(?:.*/)?([^"]*)", line (\d+) in (.*)$', re.MULTILINE)
"""What Python's faulthandler writes of the thread that crashed, or that was asked: its innermost call."""


def path_of(folder: Path, cell_id: str) -> Path:
    """Where a cell's last words lie in the experiment's folder."""
    return folder / LOGS_DIR / f"{cell_id}.txt"


class LastWords:
    """The end of a pipe that another process's stderr goes into; `theirs` is the other end, for that process
    to `speak_into` and for this one to close."""

    def __init__(self) -> None:
        self.ours, self.theirs = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.ours.fileno(), False)
        self.more = True
        """False once nobody holds the other end."""
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self) -> None:
        """Take what has come so far."""
        while self.more:
            try:
                chunk = os.read(self.ours.fileno(), 2**16)
            except BlockingIOError:
                return
            self.more = bool(chunk)
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            sys.stderr.write(self._decoder.decode(chunk))

    def ask_where(self, pid: int) -> None:
        """Have the process say where it is, if it still can."""
        with suppress(ProcessLookupError):
            os.kill(pid, SAY_WHERE)
        deadline, quiet = time.monotonic() + ANSWER_SECONDS, ANSWER_SECONDS
        while self.more and time.monotonic() < deadline and wait([self.ours], timeout=quiet):
            self.take()
            quiet = 0.1

    @property
    def text(self) -> str:
        """What was said last."""
        return self._tail.decode(errors="replace")

    def line(self) -> str | None:
        """The line that says most: where the process crashed or was, or else the last."""
        if sites := _CRASH_SITE.findall(self.text):
            return "{}:{} in {}".format(*sites[-1])
        lines = [line.strip() for line in self.text.splitlines()]
        return next((line for line in reversed(lines) if line), None)


def speak_into(theirs: Connection) -> None:
    """Let this process's stderr go into the pipe, Python's account of a crash included."""
    os.dup2(theirs.fileno(), 2)
    theirs.close()
    faulthandler.enable()
    faulthandler.register(SAY_WHERE)


def keep(folder: Path, cell_id: str, text: str) -> None:
    """Leave these words, the cell's only ones, in the experiment's folder; none leave no file. Where there is
    no room for a file, they have been on stderr."""
    path = path_of(folder, cell_id)
    try:
        if text:
            write_atomically(path, text)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)
