"""Sweeps: which cells are still to run, one at a time on a device, each in its own process."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from bench import checkpoints, environment, isolate, records
from bench.config import Cell, ConfigError, MeasureSpec
from bench.progress import Progress
from bench.records import Record

ROOM = 2**16
"""Bytes that a record takes, and more."""
finished: list[tuple[Path, Record]] = []
"""(experiment's folder, record) of every cell this process was asked for: Hydra does not hand what a
task returns to whoever started it."""


def device_lock(device: str) -> FileLock:
    """A lock that every run on this machine takes while it measures on the device."""
    return FileLock(Path(tempfile.gettempdir()) / f"longctx-bench-{getpass.getuser()}-{device}.lock")


def identity(cell: Cell) -> dict[str, Any]:
    """The part of a record that is known before the cell runs. Raises corpora.CorpusError."""
    spec = cell.spec
    task, task_config, _ = spec.task()
    data_sha256 = task.sha256(task_config, spec.data.name)
    code_sha256 = environment.code_sha256(spec.variant)
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
    """Make the experiment's folder. Raises ConfigError where it cannot be made or takes no record more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        raise ConfigError(f"results_dir: cannot write to {folder}: {error.strerror}") from None


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


def stands(record: Record | None, cell: Cell) -> bool:
    """Whether a cell that has this record need not be measured."""
    if cell.force or record is None or record.status not in records.FINAL:
        return False
    return not (cell.rerun == "contaminated" and record.contaminated)


def run(cells: Sequence[Cell]) -> list[Record]:
    """Run each cell whose record does not stand, in rounds; returns the records of all.

    Raises ConfigError or corpora.CorpusError before the first cell runs; after that a cell that
    fails becomes a record and the sweep goes on.
    """
    if not cells:
        raise ConfigError("no cells: the overrides match nothing (is a glob misspelt?)")
    cells = rounds(cells)
    identities = [identity(cell) for cell in cells]
    for folder in {cell.folder for cell in cells}:
        make_folder(folder)
    known = [records.read(cell.folder, told["cell_id"]) for cell, told in zip(cells, identities, strict=True)]
    results = [record if stands(record, cell) else None for record, cell in zip(known, cells, strict=True)]
    with Progress(len(cells)) as progress:
        progress.skipped(sum(result is not None for result in results))
        for index, cell in enumerate(cells):
            if results[index] is None:
                progress.starting(cell.spec.label)
                results[index] = _measure(cell, identities[index])
                progress.finished(results[index])  # type: ignore[arg-type]  # just made
    done = [result for result in results if result]
    finished.extend(zip((cell.folder for cell in cells), done, strict=True))
    return done


def _measure(cell: Cell, known: dict[str, Any]) -> Record:
    """Run the cell and write its record; a checkpoint is left only where a run that was cut short goes on.

    Where the record cannot be written the cell has failed, and it is not run where that is known before.
    """
    cell_id = known["cell_id"]
    with device_lock(cell.spec.device):
        figures = environment.provenance()
        try:
            make_folder(cell.folder)
        except ConfigError as error:
            return Record(**(known | figures), status="error", reason=f"not run: {error}")
        if cell.force:
            checkpoints.remove(cell.folder, cell_id)
        figures |= isolate.run(cell, cell_id)
        record = Record(**(known | figures))
        try:
            records.write(cell.folder, record)
        except OSError as error:
            path = records.path_of(cell.folder, cell_id)
            return replace(record, status="error", reason=f"cannot write {path}: {error.strerror}")
        if record.status in records.FINAL or record.status == "diverged":  # neither would end otherwise
            checkpoints.remove(cell.folder, cell_id)
    return record
