"""The standard error of a cell's process, from Python or C.

All output is forwarded to this process's stderr immediately. The end of the output is kept, and it is stored
next to the records if the cell did not finish.
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
STACK_SIGNAL = signal.SIGUSR1
"""On this signal a cell's process writes the stack of each of its threads."""
ANSWER_SECONDS = 2.0
"""Maximum wait for these stacks."""
_CRASH_SITE = re.compile(r'^Current thread .*\n\s+File "(?:.*/)?([^"]*)", line (\d+) in (.*)$', re.MULTILINE)
"""The innermost call of the current thread, in the output of Python's faulthandler."""


def path_of(folder: Path, cell_id: str) -> Path:
    """Return the path of a cell's stored stderr in the experiment's folder."""
    return folder / LOGS_DIR / f"{cell_id}.txt"


class StderrTail:
    """The reading end of a pipe that receives the stderr of another process.

    `writer` is the writing end: that process passes it to `redirect_stderr`, and this process closes it."""

    def __init__(self) -> None:
        self.reader, self.writer = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self.reader.fileno(), False)
        self.is_open = True
        """False after every writing end is closed."""
        self._tail = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def forward(self) -> None:
        """Read and forward the output so far."""
        while self.is_open:
            try:
                chunk = os.read(self.reader.fileno(), 2**16)
            except BlockingIOError:
                return
            self.is_open = bool(chunk)
            self._tail = (self._tail + chunk)[-TAIL_BYTES:]
            sys.stderr.write(self._decoder.decode(chunk))

    def request_stacks(self, pid: int) -> None:
        """Make the process write its stacks, if it still can, and read them."""
        with suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
        deadline, quiet = time.monotonic() + ANSWER_SECONDS, ANSWER_SECONDS
        while self.is_open and time.monotonic() < deadline and wait([self.reader], timeout=quiet):
            self.forward()
            quiet = 0.1

    @property
    def text(self) -> str:
        """The end of the output."""
        return self._tail.decode(errors="replace")

    def key_line(self) -> str | None:
        """Return the most informative line:
        the location of a crash or of the requested stack, else the last line."""
        if sites := _CRASH_SITE.findall(self.text):
            return "{}:{} in {}".format(*sites[-1])
        lines = [line.strip() for line in self.text.splitlines()]
        return next((line for line in reversed(lines) if line), None)


def redirect_stderr(writer: Connection) -> None:
    """Redirect this process's stderr into the pipe, including Python's crash reports."""
    os.dup2(writer.fileno(), 2)
    writer.close()
    faulthandler.enable()
    faulthandler.register(STACK_SIGNAL)


def store(folder: Path, cell_id: str, text: str) -> None:
    """Store the end of a cell's stderr in the experiment's folder, in place of an earlier one; an empty text
    removes the file. If the file cannot be written, the text has still been on stderr."""
    path = path_of(folder, cell_id)
    try:
        if text:
            write_atomically(path, text)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)
