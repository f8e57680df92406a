"""The jobs of a sweep, in the order in which its devices take them."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Sequence

from bench.run.prepare import Job


class JobQueue:
    """Jobs for one kind of device, in order. Several threads take them, each for a device of its own.

    Jobs that another sweep measures are postponed to the end: it may then have finished. Disturbed cells,
    which are jobs with a result, are measured again when no job of their round, or of an earlier one, is
    left."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = deque((job, False) for job in jobs if job.result is None)
        self._disturbed = deque(job for job in jobs if job.result is not None)
        self._taking = threading.Lock()
        limits = (job.cell.devices for job in jobs)
        self.max_devices = min([len(jobs), *(limit for limit in limits if limit != "all")])
        """The number of devices that may be in use at the same time."""

    def postpone(self, job: Job) -> None:
        """Put back a job that another sweep measures."""
        with self._taking:
            self._jobs.append((job, True))

    def repeat(self, job: Job) -> None:
        """Put back a job whose measurement was disturbed."""
        with self._taking:
            self._disturbed.append(job)

    def take(self) -> tuple[Job, bool] | None:
        """Return the next job, and whether it was postponed; None at the end."""
        with self._taking:
            for job in self._disturbed:
                if not self._jobs or _round(job) < _round(self._jobs[0][0]):
                    self._disturbed.remove(job)
                    return job, False
            return self._jobs.popleft() if self._jobs else None


def _round(job: Job) -> int:
    return job.cell.spec.replicate


def queues(jobs: Sequence[Job]) -> dict[str, JobQueue]:
    """Return the jobs that must run, by the kind of their device."""
    by_kind: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.is_due:
            by_kind[job.cell.spec.device].append(job)
    return {kind: JobQueue(jobs) for kind, jobs in by_kind.items()}
