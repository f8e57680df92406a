"""Reports during a sweep: after each round of replicates, and within a round that takes long.

A child process builds a report, so that nothing stays in the memory of the sweep. A report that fails is one
line of output and does not stop the sweep.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.inputs.printable import printable
from bench.process.signals import Interrupts
from bench.run.prepare import Job
from bench.run.progress import Progress, duration

BUILD_SECONDS = 600.0
"""Time limit of a report."""


class RoundReports:
    """Builds the reports of the experiments of a sweep whose cells set `report_minutes`.

    A round is the cells of an experiment with the same replicate, and the repetitions of those that were
    disturbed. If several devices measure cells at the
    same time, a round ends with its last cell, whichever device measured it.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        progress: Progress,
        interrupts: Interrupts,
        build: Callable[[Path], str] | None = None,
    ) -> None:
        """`build` writes the report of a folder and returns a line about it; by default it is
        `build_in_child`."""
        self._progress, self._interrupts = progress, interrupts
        self._build = build or build_in_child
        waiting = [job for job in jobs if job.is_due and job.cell.report_minutes is not None]
        self._left = Counter(map(_round, waiting))
        """(folder, replicate) → cells that have not ended."""
        self._last = {job.cell.folder: time.monotonic() for job in waiting}
        """Folder → when its last report was written, or when the sweep began."""
        self._counting, self._building = threading.Lock(), threading.Lock()

    def ended(self, job: Job) -> None:
        """Note the end of a job, and write the report if it is time. Raises Stopped if a signal arrives."""
        minutes, key = job.cell.report_minutes, _round(job)
        if minutes is None or key not in self._left:
            return
        folder = job.cell.folder
        with self._counting:
            self._left[key] -= 1
            is_round = self._left[key] == 0
            if not is_round and time.monotonic() - self._last[folder] < 60 * minutes:
                return
            self._last[folder] = time.monotonic()
        self._interrupts.check()
        with self._interrupts.deferred(), self._building:
            begun = time.monotonic()
            line = self._build(folder)
            after = f"round {job.cell.spec.replicate}" if is_round else "the time of report_minutes"
            self._progress.note(f"after {after}: {line} ({duration(time.monotonic() - begun)})")


def _round(job: Job) -> tuple[Path, int]:
    return job.cell.folder, job.cell.spec.replicate


def build_in_child(folder: Path) -> str:
    """Write the report of an experiment in a child process; returns its first line of output, or one line
    that says why there is no report."""
    command = [sys.executable, "-m", "bench.report", str(folder)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no report: {printable(error)}"
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode == 0:
        return said[0] if said else f"report: {folder / 'report'}"
    why = said[-1] if said else f"exit status {done.returncode}"
    return f"no report: {printable(why)}"
