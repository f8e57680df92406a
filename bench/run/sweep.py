"""Sweeps: run the missing cells, one at a time on a device, each in its own process, and repeat disturbed
ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import records, trackers
from bench.config.spec import Cell
from bench.inputs.errors import ConfigError
from bench.process import compiler
from bench.process.signals import Interrupts
from bench.records import Record, RecordError
from bench.run import isolate, provenance, remeasure
from bench.run.devices import Device, devices_of
from bench.run.effort import efforts
from bench.run.job_queue import JobQueue, queues
from bench.run.locks import POLL_SECONDS, CellLocks, on_device
from bench.run.oom_skip import OutOfMemorySkip
from bench.run.prepare import Job, make_folder, prepare_jobs, to_run
from bench.run.progress import Progress, describe
from bench.run.remeasure import Allowance
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
        progress = stack.enter_context(Progress(efforts(jobs)))
        interrupts = stack.enter_context(Interrupts())
        folders = to_run(jobs)
        locks = {folder: stack.enter_context(closing(CellLocks(folder))) for folder in folders}
        ended = [job for job in jobs if job.result is not None]
        disturbed = sum(remeasure.is_due(job.cell, job.result) for job in ended)
        progress.skipped([job.cell_id for job in ended], disturbed)
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
    """Run the jobs that are due, on several devices at a time if the machine has them. At the end of each
    round its disturbed cells run again."""

    def work(queue: JobQueue, allowance: Allowance, device: Device) -> None:
        while taken := queue.take():
            interrupts.check()
            job, postponed = taken
            if postponed:
                progress.waiting("another sweep measures the remaining cells")
                time.sleep(POLL_SECONDS)
            with locks[job.cell.folder].lock(job.cell_id) as ours:
                if not ours:
                    queue.postpone(job)
                    continue
                if job.result is not None:
                    job.result = _run_again(job, job.result, device, allowance, progress, interrupts)
                else:
                    job.result = _run_job(job, device, skip, allowance, progress, interrupts)
                    skip.add(job.cell, job.result)
                    if remeasure.is_due(job.cell, job.result):
                        queue.repeat(job)
                        continue
            reports.ended(job)

    for kind, queue in queues(jobs).items():
        devices, allowance = devices_of(kind)[: queue.max_devices], Allowance()
        if len(devices) == 1:
            work(queue, allowance, devices[0])
        else:
            # A thread for each device waits for the processes of its cells; this thread receives signals.
            with interrupts.deferred(), ThreadPoolExecutor(len(devices)) as pool:
                ended = [pool.submit(work, queue, allowance, device) for device in devices]
            for each in ended:
                each.result()
        if allowance.refused:
            progress.note(f"disturbed cells without time to measure them again: {allowance.refused}")


def publish(jobs: Sequence[Job]) -> list[Record]:
    """Publish the results of the jobs in `finished` and `unrecorded`; returns their records."""
    finished.extend((job.cell.folder, job.result) for job in jobs if job.result)
    unrecorded.extend(job.cell for job in jobs if not job.result)
    return [job.result for job in jobs if job.result]


def _run_job(
    job: Job,
    device: Device,
    skip: OutOfMemorySkip,
    allowance: Allowance,
    progress: Progress,
    interrupts: Interrupts,
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

    with _alone_on(device, cell, progress, interrupts):
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
                | isolate.run(cell, job.cell_id, job.known["code_sha256"], interrupts.signal_fd, device)
                | {"attempts": 1},
            )
            allowance.spend(record)
        progress.finished(record)
    return record


@contextmanager
def _alone_on(device: Device, cell: Cell, progress: Progress, interrupts: Interrupts) -> Iterator[None]:
    """Lock the device, and defer signals, inside the context. A cell that is only planned locks no device,
    because nothing is timed."""

    def waiting(holder: str) -> None:
        interrupts.check()
        progress.waiting(f"{holder} measures on {device.kind}")

    with on_device(device, waiting) if cell.spec.measure.execute else nullcontext(), interrupts.deferred():
        yield


def _run_again(
    job: Job, first: Record, device: Device, allowance: Allowance, progress: Progress, interrupts: Interrupts
) -> Record:
    """Measure the cost of a disturbed cell again, if there is time; returns the record that is kept. If a
    signal stops it, the first record remains as it was, and the next run of the sweep repeats the cell."""
    cell = replace(job.cell, only_cost=True)
    now = records.read(cell.folder, job.cell_id)
    if now and now.sequence != first.sequence:
        progress.note(f"again, by another sweep: {describe(now)}")
        return now
    if not allowance.permits(first):
        return first
    job.before = first  # which no failed attempt replaces
    with _alone_on(device, cell, progress, interrupts):
        progress.starting(f"{cell.spec.label} again")
        begun = provenance.provenance()
        figures = isolate.run(cell, job.cell_id, job.known["code_sha256"], interrupts.signal_fd, device)
        if figures["reason"] == isolate.STOPPED:
            return first
        kept, outcome = remeasure.better(first, begun | figures | {"ended_at": provenance.now()})
        with _storing:
            stored = store_record(job, kept)
        progress.note(f"again: {describe(stored)}: {outcome}")
    return stored if stored.status == "ok" else first


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
