"""Sweeps: run the missing cells, one at a time on a device, each in its own process."""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import records, trackers
from bench.config.spec import Cell
from bench.inputs.errors import ConfigError
from bench.process import compiler
from bench.process.signals import Interrupts
from bench.records import Record, RecordError
from bench.run import isolate, provenance
from bench.run.devices import Device, devices_of
from bench.run.locks import POLL_SECONDS, CellLocks, on_device
from bench.run.oom_skip import OutOfMemorySkip
from bench.run.prepare import Job, make_folder, prepare_jobs, to_run
from bench.run.progress import Progress
from bench.run.reports import RoundReports
from bench.train import checkpoints
from variants.safe_output import drop_failed_output

finished: list[tuple[Path, Record]] = []
"""(experiment's folder, record) of every cell that this process was asked to run. It is global because Hydra
does not return the task's result to its caller."""
_storing = threading.Lock()
"""One thread at a time stores a record and informs the experiment tracker, which may not support threads."""
unrecorded: list[Cell] = []
"""Cells without a record, because their remote worker died."""


def run(cells: Sequence[Cell]) -> list[Record]:
    """Run each cell without an up-to-date record, in rounds; returns the records of all cells.

    Raises ConfigError or corpora.CorpusError before the first cell runs. After that, a cell that fails
    becomes a record and the sweep continues. A signal ends the sweep with `Stopped`.

    With the knob `estimate`, no cell runs, and the estimated duration of the sweep is printed.
    """
    if cells and (card := cells[0].estimate):
        from bench.run import estimated_duration

        print(estimated_duration.text(cells, card))
        return []
    jobs = prepare_jobs(cells)
    drop_failed_output()
    skip = OutOfMemorySkip((job.cell, job.result) for job in jobs if job.result)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(len(jobs)))
        interrupts = stack.enter_context(Interrupts())
        folders = to_run(jobs)
        locks = {folder: stack.enter_context(closing(CellLocks(folder))) for folder in folders}
        progress.skipped(sum(job.result is not None for job in jobs))
        reports = RoundReports(jobs, progress, interrupts)
        _run_all(jobs, locks, skip, progress, interrupts, reports)
    for folder in folders:
        records.remove_abandoned(folder)  # again: a killed sweep's cell may have been running at the start
    return publish(jobs)


def _run_all(
    jobs: Sequence[Job],
    locks: Mapping[Path, CellLocks],
    skip: OutOfMemorySkip,
    progress: Progress,
    interrupts: Interrupts,
    reports: RoundReports,
) -> None:
    """Run the jobs without a result, on several devices at a time if the machine has them."""

    def work(queue: JobQueue, device: Device) -> None:
        while taken := queue.take():
            interrupts.check()
            job, postponed = taken
            if postponed:
                progress.waiting("another sweep measures the remaining cells")
                time.sleep(POLL_SECONDS)
            with locks[job.cell.folder].lock(job.cell_id) as ours:
                if ours:
                    job.result = _run_job(job, device, skip, progress, interrupts)
                    skip.add(job.cell, job.result)
                else:
                    queue.postpone(job)
            if ours:
                reports.ended(job)

    for kind, queue in _queues(jobs).items():
        devices = devices_of(kind)[: queue.max_devices]
        if len(devices) == 1:
            work(queue, devices[0])
            continue
        # A thread for each device waits for the processes of its cells; this thread receives signals.
        with interrupts.deferred(), ThreadPoolExecutor(len(devices)) as pool:
            ended = [pool.submit(work, queue, device) for device in devices]
        for each in ended:
            each.result()


class JobQueue:
    """Jobs for one kind of device, in order. Several threads take them, each for a device of its own.

    Jobs that another sweep measures are postponed to the end: it may then have finished."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = deque((job, False) for job in jobs)
        limits = (job.cell.devices for job in jobs)
        self.max_devices = min([len(jobs), *(limit for limit in limits if limit != "all")])
        """The number of devices that may be in use at the same time."""

    def postpone(self, job: Job) -> None:
        """Put back a job that another sweep measures."""
        self._jobs.append((job, True))

    def take(self) -> tuple[Job, bool] | None:
        """Return the next job, and whether it was postponed; None at the end."""
        try:
            return self._jobs.popleft()
        except IndexError:
            return None


def _queues(jobs: Sequence[Job]) -> dict[str, JobQueue]:
    """Return the jobs without a result by the kind of their device."""
    by_kind: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.result is None:
            by_kind[job.cell.spec.device].append(job)
    return {kind: JobQueue(jobs) for kind, jobs in by_kind.items()}


def publish(jobs: Sequence[Job]) -> list[Record]:
    """Publish the results of the jobs in `finished` and `unrecorded`; returns their records."""
    finished.extend((job.cell.folder, job.result) for job in jobs if job.result)
    unrecorded.extend(job.cell for job in jobs if not job.result)
    return [job.result for job in jobs if job.result]


def _run_job(
    job: Job, device: Device, skip: OutOfMemorySkip, progress: Progress, interrupts: Interrupts
) -> Record:
    """Return the record of a cell that this process has locked:
    an existing one, a skipped or a measured cell."""
    if record := job.reload_record():
        progress.elsewhere(record)
        return record
    cell = job.cell
    if reason := skip.reason(cell):
        return _not_run(job, "predicted_oom", reason, progress)
    if cell.spec.is_compiled and (reason := compiler.missing(cell.spec.device)):
        return _not_run(job, "unsupported", f"compile={cell.spec.compile} {reason}", progress)

    def waiting() -> None:
        interrupts.check()
        progress.waiting(f"another run measures on {device.kind}")

    with (
        on_device(device, waiting),
        interrupts.deferred(),
    ):
        progress.starting(cell.spec.label)
        begun = provenance.provenance()
        try:
            make_folder(cell.folder)
        except ConfigError as error:
            record = Record(**(job.known | begun), status="error", reason=f"not run: {error}")
        else:
            if cell.force:
                checkpoints.remove(cell.folder, job.cell_id)
            record = _store_figures(
                job,
                begun
                | isolate.run(cell, job.cell_id, job.known["code_sha256"], interrupts.signal_fd, device),
            )
        progress.finished(record)
    return record


def _not_run(job: Job, status: str, reason: str, progress: Progress) -> Record:
    """Store the record of a cell that need not be started to know its result."""
    record = _store_figures(job, provenance.provenance() | {"status": status, "reason": reason})
    progress.finished(record)
    return record


def _store_figures(job: Job, figures: dict[str, Any]) -> Record:
    with _storing:
        return store_record(job, Record(**(job.known | figures), ended_at=provenance.now()))


def store_record(job: Job, record: Record) -> Record:
    """Write the cell's record, unless a failed or interrupted attempt would replace a record with figures.

    The checkpoint is kept only if the next run can resume from it. If the record cannot be written, or has
    invalid figures, the cell's status becomes `error`."""
    record = _validated(job, record)
    folder, final = job.cell.folder, record.status in records.FINAL
    if final or job.before is None or job.before.status != "ok":
        try:
            records.write(folder, record)
        except OSError as error:
            path = records.path_of(folder, job.cell_id)
            return replace(record, status="error", reason=f"cannot write {path}: {error.strerror}")
        trackers.log(job.cell.tracker, folder, record)
    if final or record.status == "diverged":  # resuming would not change the result
        checkpoints.remove(folder, job.cell_id)
    return record


def _validated(job: Job, record: Record) -> Record:
    """Add the sequence number to the record. If a figure is out of its bounds, the figures are removed and
    the status becomes `error`, because the record could not be read."""
    if record.sequence is None:
        record = replace(record, sequence=job.sequence.next())
    try:
        records.parse(record.to_json(), "figures")
    except RecordError as error:
        kept = {key: getattr(record, key) for key in ("started_at", "ended_at", "sequence")}
        return Record(**(job.known | kept), status="error", reason=str(error))
    return record
