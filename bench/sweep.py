"""Sweeps: which cells are still to run, one at a time on a device, each in its own process."""

from __future__ import annotations

import getpass
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from bench import environment, isolate, records
from bench.config import Cell, ConfigError
from bench.progress import Progress
from bench.records import Record

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
        "measure": spec.measure.preset,
        "code_sha256": code_sha256,
    }


def make_folder(folder: Path) -> None:
    """Make the experiment's folder. Raises ConfigError where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"results_dir: cannot write to {folder}: {error.strerror}") from None


def run(cells: Sequence[Cell]) -> list[Record]:
    """Run each cell whose record is not final, in order; returns the records of all.

    Raises ConfigError or corpora.CorpusError before the first cell runs; after that a cell that
    fails becomes a record and the sweep goes on.
    """
    if not cells:
        raise ConfigError("no cells: the overrides match nothing (is a glob misspelt?)")
    identities = [identity(cell) for cell in cells]
    for folder in {cell.folder for cell in cells}:
        make_folder(folder)
    known = [
        None if cell.force else records.read(cell.folder, known["cell_id"])
        for cell, known in zip(cells, identities, strict=True)
    ]
    results = [record if record and record.status in records.FINAL else None for record in known]
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
    with device_lock(cell.spec.device):
        figures = environment.provenance()
        figures |= isolate.run(cell)
    record = Record(**(known | figures))
    records.write(cell.folder, record)
    return record
