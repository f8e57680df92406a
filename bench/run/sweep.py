"""Sweeps: which cells are still to run, one at a time on a device, each in its own process."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import partial
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
from bench.run.locks import Claims, on_device
from bench.run.oom_skip import Lines
from bench.run.progress import Progress
from bench.train import checkpoints
from variants.safe_output import drop_failed_output

ROOM = 2**16
"""Bytes that a record takes, and more."""
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
"""(experiment's folder, record) of every cell this process was asked for: Hydra does not hand what a
task returns to whoever started it."""
unrecorded: list[Cell] = []
"""Cells that this process was asked for and that have no record: those who ran them, elsewhere, died."""


def identity(cell: Cell) -> dict[str, Any]:
    """The part of a record that is known before the cell runs. Raises corpora.CorpusError."""
    spec = cell.spec
    task, task_config, _ = spec.task()
    data_sha256 = task.sha256(task_config, spec.data.name)
    code_sha256 = code_hash.code_sha256(spec.variant)
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
    """What is asked of training; nothing where there is none."""
    if not (measure.execute and measure.train_amount):
        return {}
    return {
        "train_budget": measure.train_budget,
        "train_amount": measure.train_amount,
        "learning_rate": measure.learning_rate,
        "eval_split": measure.eval_split,
    }


def make_folder(folder: Path) -> None:
    """Make the experiment's folder. Raises ConfigError where it cannot be made or takes no record more, or
    where this user may not write what a cell leaves there."""
    place = folder
    try:
        records.make_folder(folder / records.RECORDS_DIR)
        with tempfile.TemporaryFile(dir=folder / records.RECORDS_DIR) as file:
            file.write(bytes(ROOM))
            file.flush()
        for place in (folder, *(folder / name for name in FOLDERS)):
            if place.exists() and not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"results_dir: cannot write to {printable(place)}: {error.strerror}") from None


def _check_storable(known: dict[str, Any]) -> None:
    """Raise ConfigError for a configuration that its record could not give back: nothing is measured that
    cannot be read."""
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


def rounds(cells: Sequence[Cell]) -> list[Cell]:
    """The cells replicate by replicate, in their order within each, so that what drifts falls on all alike.

    A twin comes after every variant that its sibling is compared with, and so sees as much drift as they do.
    """

    def setting(cell: Cell) -> str:
        return repr((cell.folder, replace(cell.spec, variant="", variant_params={}, twin=0)))

    last = {setting(cell): place for place, cell in enumerate(cells) if not cell.spec.twin}

    def order(placed: tuple[int, Cell]) -> tuple[int, int, int]:
        place, cell = placed
        twin = cell.spec.twin
        return cell.spec.replicate, last.get(setting(cell), place) if twin else place, twin

    return [cell for _, cell in sorted(enumerate(cells), key=order)]


def distinct(cells: Sequence[Cell]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """The cells, each once in its folder, and what is known of each; says how many were asked for again."""
    found: dict[tuple[Path, str], tuple[Cell, dict[str, Any]]] = {}
    for cell in cells:
        known = identity(cell)
        found.setdefault((cell.folder, known["cell_id"]), (cell, known))
    if again := len(cells) - len(found):
        print(
            f"{again} of {len(cells)} cells are asked for twice and run once; twin=0,1 measures a cell twice",
            file=sys.stderr,
            flush=True,
        )
    return [cell for cell, _ in found.values()], [known for _, known in found.values()]


def stands(record: Record | None, cell: Cell) -> bool:
    """Whether a cell that has this record need not be measured."""
    if cell.force or record is None or record.status not in records.FINAL:
        return False
    if cell.rerun == "oom":
        return record.status not in ("oom", "predicted_oom")
    return not (cell.rerun == "contaminated" and record.contaminated)


@dataclass
class Job:
    """A cell of the sweep, and what came of it."""

    cell: Cell
    known: dict[str, Any]
    """The part of its record that is known before it runs."""
    before: Record | None
    """The record that was there as the sweep began."""
    sequence: records.Sequence
    """What numbers the records of its folder."""
    result: Record | None = None

    @classmethod
    def of(cls, cell: Cell, known: dict[str, Any], sequence: records.Sequence) -> Job:
        """With the record that is there now. Raises ConfigError where this user may not read it."""
        try:
            before = records.read(cell.folder, known["cell_id"])
        except OSError as error:
            place = printable(error.filename or cell.folder)
            raise ConfigError(f"results_dir: cannot read {place}: {error.strerror}") from None
        return cls(cell, known, before, sequence, before if stands(before, cell) else None)

    @property
    def cell_id(self) -> str:
        """The cell's."""
        return str(self.known["cell_id"])

    def meanwhile(self) -> Record | None:
        """The record that another sweep has written since this one began."""
        with suppress(OSError), os.scandir(self.cell.folder / records.RECORDS_DIR):
            pass  # NFS then asks what is in the folder now, instead of trusting that the record was not there
        now = records.read(self.cell.folder, self.cell_id)
        return now if now != self.before else None


def plan(cells: Sequence[Cell]) -> list[Job]:
    """The cells in rounds, each with the record that it has; makes the folders of those that are to run.

    Raises ConfigError or corpora.CorpusError.
    """
    if not cells:
        raise ConfigError("no cells: the overrides match nothing (is a glob misspelt?)")
    cells, identities = distinct(rounds(cells))
    for known in identities:
        _check_storable(known)
    sequences = {cell.folder: records.Sequence(cell.folder) for cell in cells}
    jobs = [
        Job.of(cell, known, sequences[cell.folder]) for cell, known in zip(cells, identities, strict=True)
    ]
    for folder in _to_run(jobs):
        make_folder(folder)
        records.tidy(folder)
    return jobs


def _to_run(jobs: Sequence[Job]) -> set[Path]:
    """The folders of the jobs that have no result."""
    return {job.cell.folder for job in jobs if job.result is None}


def run(cells: Sequence[Cell]) -> list[Record]:
    """Run each cell whose record does not stand, in rounds; returns the records of all.

    Raises ConfigError or corpora.CorpusError before the first cell runs; after that a cell that fails becomes
    a record and the sweep goes on. A signal ends it with interrupts.Stopped.
    """
    jobs = plan(cells)
    drop_failed_output()
    lines = Lines((job.cell, job.result) for job in jobs if job.result)
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(len(jobs)))
        interrupts = stack.enter_context(Interrupts())
        folders = _to_run(jobs)
        claims = {folder: stack.enter_context(closing(Claims(folder))) for folder in folders}
        progress.skipped(sum(job.result is not None for job in jobs))
        for wait in (False, True):  # what another sweep has in hand comes last, when that may be done with it
            for job in [job for job in jobs if job.result is None]:
                if wait:
                    progress.waiting("another sweep measures what is left")
                with claims[job.cell.folder].of(job.cell_id, wait=wait) as ours:
                    if ours:
                        job.result = _settle(job, lines, progress, interrupts)
                        lines.note(job.cell, job.result)
    for folder in folders:
        records.tidy(folder)  # a cell may have outlived its sweep as this one began
    return report(jobs)


def report(jobs: Sequence[Job]) -> list[Record]:
    """Tell what came of the jobs to whoever started this process; returns their records."""
    finished.extend((job.cell.folder, job.result) for job in jobs if job.result)
    unrecorded.extend(job.cell for job in jobs if not job.result)
    return [job.result for job in jobs if job.result]


def _settle(job: Job, lines: Lines, progress: Progress, interrupts: Interrupts) -> Record:
    """What comes of a cell that nobody else has in hand."""
    if record := job.meanwhile():
        progress.elsewhere(record)
        return record
    cell = job.cell
    if reason := lines.past(cell):
        record = _keep(job, provenance.provenance() | {"status": "predicted_oom", "reason": reason})
        progress.finished(record)
        return record
    device = cell.spec.device
    with on_device(device, partial(progress.waiting, f"another run measures on {device}")), interrupts.held():
        progress.starting(cell.spec.label)
        begun = provenance.provenance()
        try:
            make_folder(cell.folder)
        except ConfigError as error:
            record = Record(**(job.known | begun), status="error", reason=f"not run: {error}")
        else:
            if cell.force:
                checkpoints.remove(cell.folder, job.cell_id)
            record = _keep(
                job, begun | isolate.run(cell, job.cell_id, job.known["code_sha256"], interrupts.asked)
            )
        progress.finished(record)
    return record


def _keep(job: Job, figures: dict[str, Any]) -> Record:
    return keep(job, Record(**(job.known | figures), ended_at=provenance.now()))


def keep(job: Job, record: Record) -> Record:
    """Write the cell's record, unless an attempt that failed, or that a signal stopped, would take the place
    of figures; a checkpoint is left only where a run that was cut short goes on. A cell whose record cannot
    be written has failed, and so has one with figures that cannot be."""
    record = _readable(job, record)
    folder, final = job.cell.folder, record.status in records.FINAL
    if final or job.before is None or job.before.status != "ok":
        try:
            records.write(folder, record)
        except OSError as error:
            path = records.path_of(folder, job.cell_id)
            return replace(record, status="error", reason=f"cannot write {path}: {error.strerror}")
        trackers.log(job.cell.tracker, folder, record)
    if final or record.status == "diverged":  # neither would end otherwise
        checkpoints.remove(folder, job.cell_id)
    return record


def _readable(job: Job, record: Record) -> Record:
    """The record with its place among the folder's; without figures where one of them cannot be, since nobody
    could read it."""
    if record.sequence is None:
        record = replace(record, sequence=job.sequence.next())
    try:
        records.parse(record.to_json(), "figures")
    except RecordError as error:
        told = {key: getattr(record, key) for key in ("started_at", "ended_at", "sequence")}
        return Record(**(job.known | told), status="error", reason=str(error))
    return record
