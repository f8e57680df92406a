"""Preparation of a sweep: its cells in order and without duplicates, their identities, and their existing
records.

Mistakes of the user are found here, before the first cell is measured.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import records
from bench.config.spec import Cell, MeasureSpec
from bench.inputs.errors import ConfigError
from bench.inputs.printable import printable
from bench.process import stderr_tail
from bench.records import Record, RecordError
from bench.run import code_hash, remeasure
from bench.train import checkpoints

MAX_RECORD_BYTES = 2**16
"""Upper bound on the size of one record, in bytes."""
FOLDERS = (
    records.RECORDS_DIR,
    records.CURVES_DIR,
    checkpoints.CHECKPOINTS_DIR,
    stderr_tail.LOGS_DIR,
    "gates",
    "roofline",
    "launch",
    "baselines",
    records.PROFILES_DIR,
)
"""Folders of an experiment into which a cell writes."""


def identity(cell: Cell) -> dict[str, Any]:
    """Return the part of a record that is known before the cell runs. Raises corpora.CorpusError."""
    spec = cell.spec
    task, task_config, _ = spec.task()
    data_sha256 = task.sha256(task_config, spec.data.name)
    code_sha256 = code_hash.code_sha256(*spec.variants(), modules=tuple(spec.slot_modules()))
    return {
        "cell_id": spec.cell_id(data_sha256, code_sha256),
        "name": cell.name,
        "variant": spec.variant,
        "variant_params": spec.variant_params,
        "seq_len": spec.seq_len,
        "depth": spec.depth,
        "d_model": spec.model.d_model,
        "heads": spec.model.heads,
        "feed_forward": spec.feed_forward.name,
        "feed_forward_params": spec.feed_forward.params,
        "stack": spec.stack.name,
        "stack_params": spec.stack.params,
        "ff_chunks": spec.model.ff_chunks,
        "vocab_size": spec.model.vocab_size,
        "tie_embeddings": spec.model.tie_embeddings,
        "rotary_base": spec.model.rotary_base,
        "head_size": spec.model.head_size,
        "kv_heads": spec.model.kv_heads,
        "widen_feed_forward": spec.model.widen_feed_forward,
        "embedding_size": spec.model.embedding_size,
        "norm": spec.model.norm,
        "norm_position": spec.model.norm_position,
        "residual": spec.model.residual,
        "dropout": spec.model.dropout,
        "batch_size": spec.batch_size,
        "activations": spec.activations,
        "compile": spec.compile,
        "objective": spec.objective,
        "data": spec.data.name,
        "data_params": spec.data.params,
        "data_sha256": data_sha256,
        **task.data_figures(task_config, spec.data.name),
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
        "schedule": measure.schedule,
        "train_state": "carried" if measure.carry_state else "fresh",
        "search_budget": measure.search_budget if measure.learning_rate == "search" else None,
        "learning_rate": None if measure.learning_rate == "search" else measure.learning_rate,
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
    drift. A twin that a grid interleaves keeps its place.
    """

    def setting(cell: Cell) -> str:
        return repr((cell.folder, replace(cell.spec, variant="", variant_params={}, objective="", twin=0)))

    def is_fixed(cell: Cell) -> bool:
        return cell.placed or not cell.spec.twin

    last = {setting(cell): place for place, cell in enumerate(cells) if is_fixed(cell)}

    def order(numbered: tuple[int, Cell]) -> tuple[int, int, int]:
        place, cell = numbered
        key = place if is_fixed(cell) else last.get(setting(cell), place)
        return cell.spec.replicate, key, cell.spec.twin * (not cell.placed)

    return [cell for _, cell in sorted(enumerate(cells), key=order)]


def deduplicate(cells: Sequence[Cell]) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Remove duplicate cells; returns the cells and the identity of each,
    and prints the number of duplicates."""
    distinct: dict[tuple[Path, str], tuple[Cell, dict[str, Any]]] = {}
    for cell in cells:
        known = identity(cell)
        distinct.setdefault((cell.folder, known["cell_id"]), (cell, known))
    if duplicates := len(cells) - len(distinct):
        print(
            f"{duplicates} of {len(cells)} cells are duplicates and run only once; "
            "twin=0,1 measures a cell twice",
            file=sys.stderr,
            flush=True,
        )
    return [cell for cell, _ in distinct.values()], [known for _, known in distinct.values()]


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

    @property
    def is_due(self) -> bool:
        """Whether the cell must run, or run again because its measurement was disturbed."""
        return self.result is None or remeasure.is_due(self.cell, self.result)

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
    for folder in to_run(jobs):
        make_folder(folder)
        records.remove_abandoned(folder)
    prepare_data(jobs)
    return jobs


def prepare_data(jobs: Sequence[Job]) -> None:
    """Print what the jobs without a result read, and compute what is slow and cached, once for all of them.

    It is done here so that it takes none of a cell's time. Raises corpora.CorpusError.
    """
    described: set[str] = set()
    tokens: dict[str, int | None] = {}
    for job in jobs:
        spec, key = job.cell.spec, repr(job.cell.spec.data)
        if job.result is not None:
            continue
        task, config, _ = spec.task()
        if key not in described and (line := task.describe(config, spec.data.name)):
            print(printable(line), file=sys.stderr, flush=True)
        described.add(key)
        if spec.measure.execute:
            if key not in tokens:
                tokens[key] = task.prepare(config, spec.data.name)
            job.known["data_tokens"] = tokens[key]


def to_run(jobs: Sequence[Job]) -> set[Path]:
    """Return the folders of the jobs that must run."""
    return {job.cell.folder for job in jobs if job.is_due}
