"""A command with a time limit, whose output is shown and kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 30.0
"""Time between SIGINT, after which a command ends properly, and SIGKILL."""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    """Exit status; negative for a signal."""
    in_time: bool
    seconds: float
    output: str
    """Of stdout and stderr together."""

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        lines = [line.strip() for line in self.output.splitlines()]
        return next((line for line in reversed(lines) if line), "no output")


def run_command(
    words: Sequence[str],
    *,
    log: Path,
    seconds: float,
    cwd: Path,
    environment: Mapping[str, str],
    grace: float = GRACE_SECONDS,
) -> Ran:
    """Run a command for at most `seconds`; then it gets SIGINT, and SIGKILL after `grace` seconds, together
    with the processes that it has started. Its output is written to `log` and to stderr.

    If this process is interrupted, the command ends in the same way, and KeyboardInterrupt is raised.
    """
    begun = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    kept: list[bytes] = []
    reader = threading.Thread(target=_copy, args=(process, log, kept), daemon=True)
    reader.start()
    in_time = True
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:  # also after KeyboardInterrupt
        _end(process, grace)
    reader.join(grace)
    output = b"".join(kept).decode(errors="replace")
    return Ran(process.returncode, in_time, time.monotonic() - begun, output)


def _heed_interrupts() -> None:
    """A background job of a shell ignores SIGINT, and would pass that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _copy(process: subprocess.Popen[bytes], log: Path, kept: list[bytes]) -> None:
    assert process.stdout is not None
    with log.open("wb") as file, process.stdout:
        for line in process.stdout:
            kept.append(line)
            file.write(line)
            file.flush()
            sys.stderr.write(line.decode(errors="replace"))
            sys.stderr.flush()


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError):  # what it has started, too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
