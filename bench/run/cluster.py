"""Cells as jobs of a Hydra launcher: their grouping, their resource requirements and their results.

The launcher decides where a job runs. A job composes its cells again from their overrides and measures them
as a normal sweep does: it locks each cell in the results folder and uses the device exclusively. A job also
returns its records, so that they are available here even if the results folder is not shared.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from bench import records
from bench.config import parse
from bench.config.spec import Cell, ClusterSpec
from bench.inputs.quoting import quoted
from bench.measure.contention import cores
from bench.records import Record
from bench.run import prepare, sweep
from bench.run.prepare import Job
from bench.run.progress import describe
from variants.safe_output import drop_failed_output

T = TypeVar("T")

CELLS = "cells"
"""The key of a job's config that holds its cells, each as a list of overrides."""
MOST_JOBS = 1000
"""Maximum number of jobs submitted at once; SLURM's default limit of an array is 1001 (MaxArraySize)."""
SECONDS_BESIDE = 30
"""Additional time per cell, beyond its limit:
composing it, ending its process, waiting for the file system."""
A_YEAR = 366 * 24 * 60
"""Maximum time limit of a job, in minutes, because schedulers require a finite one."""
SECONDS_TO_START = 300
"""Additional time per job for its start: loading Python, torch and the corpus from a slow file system."""

Launch = Callable[[ClusterSpec, list[list[str]]], Sequence[list[str] | Exception]]
"""Runs jobs, given as lists of overrides, with the cluster's knobs. Returns for each job its records as JSON
or the exception with which it failed. Raises if a job died."""


@dataclass
class CellsOfJob:
    """The task function of a launcher. It is pickled, and called in another process or on another machine."""

    loader: Any
    """Hydra's ConfigLoader."""
    composed: DictConfig
    """The composed config of the sweep."""
    folder: Path
    """The working directory of the sweep, to which relative paths in its overrides refer on every machine."""

    def __call__(self, cfg: DictConfig) -> list[str]:
        """Measure the job's cells; returns their records as JSON."""
        drop_failed_output()
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = OmegaConf.to_container(cfg[CELLS], resolve=False)
        assert isinstance(lines, list)
        with contextlib.chdir(self.folder):
            cells = [parse.parse(self.loader.load_sweep_config(self.composed, line)) for line in lines]
            cells = [replace(cell, report_minutes=None) for cell in cells]  # a job does not know the rounds
            return [record.to_json() for record in sweep.run(cells)]


def run(
    cells: Sequence[Cell], overrides: Sequence[list[str]], cluster: ClusterSpec, launch: Launch
) -> list[Record]:
    """Run each cell without an up-to-date record through a launcher; returns the records of all cells.

    `overrides` are those from which each cell was composed. Raises as `prepare.prepare_jobs` does, before the
    first job is submitted. After that, a job that fails or dies only causes a message; the next run of the
    sweep runs its cells.
    """
    jobs = prepare.prepare_jobs(cells)
    drop_failed_output()
    line_of = {id(cell): line for cell, line in zip(cells, overrides, strict=True)}
    missing = [job for job in jobs if job.result is None]
    if before := len(jobs) - len(missing):
        _print(f"{before} of {len(jobs)} cells were finished before and are not run again")
    for device in dict.fromkeys(job.cell.spec.device for job in missing):
        groups = _chunked([job for job in missing if job.cell.spec.device == device], cluster.cells_per_job)
        for batch in _chunked(groups, MOST_JOBS):
            handed = [job for group in batch for job in group]
            _print(f"jobs: {len(batch)}, for {len(handed)} of {len(jobs)} cells")
            # `device=auto` is resolved here, because a job's machine may have other devices
            lines = [[[*line_of[id(job.cell)], f"device={device}"] for job in group] for group in batch]
            knobs = requirements(cluster, [[job.cell for job in group] for group in batch])
            try:
                for returned in launch(knobs, [[f"+{CELLS}={quote(line)}"] for line in lines]):
                    _collect(returned, {job.cell_id: job for job in handed})
            except Exception as error:  # the exception for a job that died depends on the launcher
                _print(f"the launcher failed, and other jobs may still be running: {_first_line(error)}")
            for job in handed:
                job.result = job.result or job.reload_record()
    return sweep.publish(jobs)


def requirements(cluster: ClusterSpec, groups: Sequence[Sequence[Cell]]) -> ClusterSpec:
    """Return the cluster's knobs for these jobs, all on one type of device, with the unset ones filled in."""
    on_cpu = groups[0][0].spec.device == "cpu"
    limits = [sum(cell.spec.measure.limit_seconds + SECONDS_BESIDE for cell in group) for group in groups]
    return replace(
        cluster,
        gpus=int(not on_cpu) if cluster.gpus is None else cluster.gpus,
        cpus=(len(cores()) if on_cpu else 1) if cluster.cpus is None else cluster.cpus,
        minutes=cluster.minutes or math.ceil(min((SECONDS_TO_START + max(limits)) / 60, A_YEAR)),
    )


def quote(lines: Sequence[Sequence[str]]) -> str:
    """Return lists of overrides as a value in Hydra's grammar."""
    return "[" + ",".join("[" + ",".join(map(quoted, line)) + "]" for line in lines) + "]"


def _chunked(whole: Sequence[T], size: int) -> list[Sequence[T]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _collect(returned: list[str] | Exception, jobs: dict[str, Job]) -> None:
    """Assign each cell the record that its job returned, and write the records that are not here yet."""
    if isinstance(returned, Exception):
        _print(f"a job failed: {_first_line(returned)}")
        return
    for text in returned:
        record = records.parse(text, "a job's record")
        job = jobs.get(record.cell_id)
        if job is None:
            _print(f"a job used other code or data than this machine: {describe(record)}")
            continue
        here = records.read(job.cell.folder, job.cell_id) == record
        job.result = record if here else sweep.store_record(job, record)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
