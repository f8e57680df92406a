"""A function in a child process with a time limit, whose results survive its death.

An error of an accelerator's driver leaves a process unusable, and a kernel can abort it. The parent keeps
what the function had reported until then, and gets the reason in one line.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from bench.process import forkserver
from bench.process.stderr_tail import StderrTail, redirect_stderr

Report = Callable[[Any], None]


class Refused(Exception):
    """A function cannot do its work, for the reason in the message; its traceback is not shown."""


@dataclass
class Outcome:
    """What a function reported, and how its process ended."""

    reported: list[Any] = field(default_factory=list)
    failure: str | None = None
    """Why the function did not return, in one line; None if it did."""
    raised: str | None = None
    """Type of the exception that ended it; None if there was none."""


def run_limited(function: Callable[..., None], *arguments: Any, seconds: float) -> Outcome:
    """Call `function(report, *arguments)` in a child process, for at most `seconds`.

    The function, its arguments and the objects that it reports must be picklable. The child's stderr is
    forwarded.
    """
    outcome, tail = Outcome(), StderrTail()
    ours, theirs = Pipe(duplex=False)
    child = forkserver.context().Process(
        target=_child, args=(function, arguments, theirs, tail.writer), daemon=False
    )
    child.start()
    theirs.close()
    tail.writer.close()
    try:
        in_time = _collect(ours, tail, child, time.monotonic() + seconds, outcome)
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        tail.forward()
        ours.close()
    if not in_time:
        outcome.failure = f"still running after {seconds:.0f} s"
    elif outcome.reported and isinstance(last := outcome.reported[-1], _Raised):
        outcome.reported.pop()
        outcome.raised, outcome.failure = last.kind, last.message
    elif child.exitcode:
        outcome.failure = _failure(child.exitcode, tail)
    tail.reader.close()
    return outcome


def _collect(ours: Connection, tail: StderrTail, child: Any, deadline: float, outcome: Outcome) -> bool:
    """Collect reports until the child ends; returns False if the deadline passes before."""
    reporting = True
    while True:
        pipes: list[Any] = [*([ours] if reporting else []), *([tail.reader] if tail.is_open else [])]
        ready = wait([*pipes, child.sentinel], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        tail.forward()
        if ours in ready:
            try:
                outcome.reported.append(ours.recv())
            except (EOFError, OSError):
                reporting = False
        elif child.sentinel in ready:
            return True


def _failure(exitcode: int, tail: StderrTail) -> str:
    ended = f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit status {exitcode}"
    line = tail.key_line()
    return f"{ended}: {line}" if line else ended


@dataclass(frozen=True)
class _Raised:
    """An exception, by the name of its type and the first line of its message."""

    kind: str
    message: str


def _child(
    function: Callable[..., None], arguments: tuple[Any, ...], theirs: Connection, stderr: Any
) -> None:
    redirect_stderr(stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops this process
    try:
        function(theirs.send, *arguments)
    except Exception as error:
        if not isinstance(error, Refused):
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        theirs.send(_Raised(type(error).__name__, lines[0] if lines else type(error).__name__))
    theirs.close()
