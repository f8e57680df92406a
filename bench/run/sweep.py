"""Sweeps: run the missing cells, one at a time on a device, each in its own process."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import records, trackers
from bench.config.spec import Cell, MeasureSpec
from bench.inputs.errors import ConfigError
from bench.inputs.printable import printable
from bench.process import stderr_tail
from bench.process.signals import Interrupts
from bench.records import Record, RecordError
from bench.run import code_hash, isolate, provenance
from bench.run.devices import Device, devices_of
from bench.run.locks import POLL_SECONDS, CellLocks, on_device
from bench.run.oom_skip import OutOfMemorySkip
from bench.run.progress import Progress
from bench.train import checkpoints
from variants.safe_output import drop_failed_output

MAX_RECORD_BYTES = 2**16
"""Upper bound on the size of one record, in bytes."""
FOLDERS = (
    records.RECORDS_DIR,
    records.CURVES_DIR,
    checkpoints.CHECKPOINTS_DIR,
    stderr_tail.LOGS_DIR,
    "gates",
    "roofline",
)
"""Folders of an experiment into which a cell writes."""
finished: list[tuple[Path, Record]] = []
"""(experiment's folder, record) of every cell that this process was asked to run. It is global because Hydra
does not return the task's result to its caller."""
_storing = threading.Lock()
"""One thread at a time stores a record and informs the experiment tracker, which may not support threads."""
unrecorded: list[Cell] = []
"""Cells without a record, because their remote worker died."""


def identity(cell: Cell) -> dict[str, Any]:
    """Return the part of a record that is known before the cell runs. Raises corpora.CorpusError."""
    spec = cell.spec
    task, task_config, _ = spec.task()
    data_sha256 = task.sha256(task_config, spec.data.name)
    code_sha256 = code_hash.code_sha256(*spec.variants())
    return {
        "cell_id": spec.cell_id(data_sha256, code_sha256),
        "name": cell.name,
        "variant": spec.variant,
        "variant_params": spec.variant_params,
        "seq_len": spec.seq_len,
        "depth": spec.depth,
        "d_model": spec.model.d_model,
        "heads": spec.model.heads,
        "ff_chunks": spec.model.ff_chunks,
        "batch_size": spec.batch_size,
        "activations": spec.activations,
        "objective": spec.objective,
        "data": spec.data.name,
        "data_params": spec.data.params,
        "data_sha256": data_sha256,
        "dtype": spec.dtype,
        "device": spec.device,
        "replicate": spec.replicate,
        "twin": spec.twin,
        "measure": spec.measure.preset,
        "budget_bytes": spec.measure.budget,
        **_training(spec.measure),
        "code_sha256": code_sha256,
    }


def _training(measure: MeasureSpec) -> dict[str, Any]:
    """Return the settings of training; empty if the cell does not train."""
    if not (measure.execute and measure.train_amount):
        return {}
    return {
        "train_budget": measure.train_budget,
        "train_amount": measure.train_amount,
        "learning_rate": measure.learning_rate,
        "eval_split": measure.eval_split,
    }


def make_folder(folder: Path) -> None:
    """Create the experiment's folder. Raises ConfigError if it cannot be created, has no space for another
    record, or is not writable for this user."""
    place = folder
    try:
        records.make_folder(folder / records.RECORDS_DIR)
        with tempfile.TemporaryFile(dir=folder / records.RECORDS_DIR) as file:
            file.write(bytes(MAX_RECORD_BYTES))
            file.flush()
        for place in (folder, *(folder / name for name in FOLDERS)):
            if place.exists() and not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"results_dir: cannot write to {printable(place)}: {error.strerror}") from None


def _check_storable(known: dict[str, Any]) -> None:
    """Raise ConfigError for a configuration that a record cannot represent, before the cell is measured."""
    try:
        read = records.parse(Record(**known, status="ok").to_json(), "a record of this cell")
    except RecordError as error:
        raise ConfigError(str(error)) from None
    for key, value in known.items():
        if (stored := getattr(read, key)) != value:
            raise ConfigError(
                f"{key}={printable(repr(value), 200)}: a record would hold {printable(repr(stored), 200)}; "
                "allowed are finite numbers and text in UTF-8"
            )


def order_in_rounds(cells: Sequence[Cell]) -> list[Cell]:
    """Order the cells by replicate and otherwise keep their order, so that drift of the machine affects all
    variants equally.

    A twin comes after all variants with which its original is compared, so that it is subject to the same
    drift.
    """

    def setting(cell: Cell) -> str:
        return repr((cell.folder, replace(cell.spec, variant="", variant_params={}, twin=0)))

    last = {setting(cell): place for place, cell in enumerate(cells) if not cell.spec.twin}

    def order(placed: tuple[int, Cell]) -> tuple[int, int, int]:
        place, cell = placed
        twin = cell.spec.twin
        return cell.spec.replicate, last.get(setting(cell), place) if twin else place, twin

    return [cell for _, cell in sorted(enumerate(cells), key=order)]


def deduplicate(cells: Sequence[Cell]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Remove duplicate cells; returns the cells and the identity of each,
    and prints the number of duplicates."""
    found: dict[tuple[Path, str], tuple[Cell, dict[str, Any]]] = {}
    for cell in cells:
        known = identity(cell)
        found.setdefault((cell.folder, known["cell_id"]), (cell, known))
    if again := len(cells) - len(found):
        print(
            f"{again} of {len(cells)} cells are duplicates and run only once; twin=0,1 measures a cell twice",
            file=sys.stderr,
            flush=True,
        )
    return [cell for cell, _ in found.values()], [known for _, known in found.values()]


def is_up_to_date(record: Record | None, cell: Cell) -> bool:
    """Return whether a cell with this record need not be measured again."""
    if cell.force or record is None or record.status not in records.FINAL:
        return False
    if cell.rerun == "oom":
        return record.status not in ("oom", "predicted_oom")
    return not (cell.rerun == "contaminated" and record.contaminated)


@dataclass
class Job:
    """A cell of the sweep and its result."""

    cell: Cell
    known: dict[str, Any]
    """The part of the record that is known before the cell runs."""
    before: Record | None
    """The record that existed when the sweep began."""
    sequence: records.SequenceNumbers
    """The sequence numbers of the folder's records."""
    result: Record | None = None

    @classmethod
    def of(cls, cell: Cell, known: dict[str, Any], sequence: records.SequenceNumbers) -> Job:
        """Create a job with the record that exists now.
        Raises ConfigError if this user has no permission to read it."""
        try:
            before = records.read(cell.folder, known["cell_id"])
        except OSError as error:
            place = printable(error.filename or cell.folder)
            raise ConfigError(f"results_dir: cannot read {place}: {error.strerror}") from None
        return cls(cell, known, before, sequence, before if is_up_to_date(before, cell) else None)

    @property
    def cell_id(self) -> str:
        """The id of the cell."""
        return str(self.known["cell_id"])

    def reload_record(self) -> Record | None:
        """Return the record that another sweep has written since this one began, or None."""
        with suppress(OSError), os.scandir(self.cell.folder / records.RECORDS_DIR):
            pass  # makes NFS list the folder again, instead of using its cache of missing files
        now = records.read(self.cell.folder, self.cell_id)
        return now if now != self.before else None


def prepare_jobs(cells: Sequence[Cell]) -> list[Job]:
    """Return the jobs in order of their rounds, each with its existing record, and create the folders of
    cells that must run.

    Raises ConfigError or corpora.CorpusError.
    """
    if not cells:
        raise ConfigError("no cells: the overrides match nothing (is a glob misspelt?)")
    cells, identities = deduplicate(order_in_rounds(cells))
    for known in identities:
        _check_storable(known)
    sequences = {cell.folder: records.SequenceNumbers(cell.folder) for cell in cells}
    jobs = [
        Job.of(cell, known, sequences[cell.folder]) for cell, known in zip(cells, identities, strict=True)
    ]
    for folder in _to_run(jobs):
        make_folder(folder)
        records.remove_abandoned(folder)
    return jobs


def _to_run(jobs: Sequence[Job]) -> set[Path]:
    """Return the folders of the jobs without a result."""
    return {job.cell.folder for job in jobs if job.result is None}


def run(cells: Sequence[Cell]) -> list[Record]:
    """Run each cell without an up-to-date record, in rounds; returns the records of all cells.

    Raises ConfigError or corpora.CorpusError before the first cell runs. After that, a cell that fails
    becomes a record and the sweep continues. A signal ends the sweep with `Stopped`.
    """
    jobs = prepare_jobs(cells)
    drop_failed_output()
    skip = OutOfMemorySkip((job.cell, job.result) for job in jobs if job.result)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(len(jobs)))
        interrupts = stack.enter_context(Interrupts())
        folders = _to_run(jobs)
        locks = {folder: stack.enter_context(closing(CellLocks(folder))) for folder in folders}
        progress.skipped(sum(job.result is not None for job in jobs))
        _run_all(jobs, locks, skip, progress, interrupts)
    for folder in folders:
        records.remove_abandoned(folder)  # again: a killed sweep's cell may have been running at the start
    return publish(jobs)


def _run_all(
    jobs: Sequence[Job],
    locks: Mapping[Path, CellLocks],
    skip: OutOfMemorySkip,
    progress: Progress,
    interrupts: Interrupts,
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
        record = _store_figures(job, provenance.provenance() | {"status": "predicted_oom", "reason": reason})
        progress.finished(record)
        return record

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
        told = {key: getattr(record, key) for key in ("started_at", "ended_at", "sequence")}
        return Record(**(job.known | told), status="error", reason=str(error))
    return record
