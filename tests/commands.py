"""`python -m bench` in the test's own process.

The processes of the cells come from one fork server for all commands of a test session. The start of a fork
server, which imports torch, would take most of the time of a command that is a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from bench.__main__ import main
from bench.run import sweep


class Done(NamedTuple):
    """What a command left, named as by `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


def bench(*arguments: str, cwd: Path | None = None) -> Done:
    """Run the command line in a folder."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["bench", *arguments]),
        patch.dict(os.environ),
        patch.object(sweep, "finished", []),
        patch.object(sweep, "unrecorded", []),
    ):
        try:
            status = main()
        except SystemExit as end:  # of Hydra's task
            status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())
