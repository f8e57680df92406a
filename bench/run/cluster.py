"""Cells as the jobs of a Hydra launcher: which go into one, what it needs, and what came of each.

The launcher decides where a job runs. A job composes its cells again from their overrides and measures them
as any sweep does: claimed in the results folder, alone on the device. Its records come back with what it
returns too, so that they are here whether the results folder is shared or not.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from bench import records
from bench.config import parse
from bench.config.spec import Cell, ClusterSpec
from bench.records import Record
from bench.run import sweep
from bench.run.progress import describe
from bench.run.sweep import Job
from variants.safe_output import drop_failed_output

T = TypeVar("T")

CELLS = "cells"
"""The key of a job's config under which its cells lie, each a list of overrides."""
MOST_JOBS = 1000
"""Jobs that are handed over at once; SLURM's own limit on the size of an array is 1001 (MaxArraySize)."""
SECONDS_BESIDE = 30
"""What a cell may take beside its limit: composing it, ending its process, waiting for the file system."""
A_YEAR = 366 * 24 * 60
"""Minutes: the longest time limit of a job, since schedulers take no endless ones."""
SECONDS_TO_START = 300
"""What a job may take before its first cell: Python, torch and the corpus from a slow file system."""

Launch = Callable[[ClusterSpec, list[list[str]]], Sequence[list[str] | Exception]]
"""Has jobs, a list of overrides each, run where the knobs say; returns the records of each as JSON, or what
it failed of. Raises where a job died."""


@dataclass
class CellsOfJob:
    """What a launcher calls, in whichever process and on whichever machine; pickled on the way there."""

    loader: Any
    """Hydra's ConfigLoader."""
    composed: DictConfig
    """The config of the sweep."""
    folder: Path
    """Where the sweep was started: relative paths in its overrides start there, on every machine."""

    def __call__(self, cfg: DictConfig) -> list[str]:
        """Measure the job's cells; returns their records as JSON."""
        drop_failed_output()
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = OmegaConf.to_container(cfg[CELLS], resolve=False)
        assert isinstance(lines, list)
        with contextlib.chdir(self.folder):
            cells = [parse.parse(self.loader.load_sweep_config(self.composed, line)) for line in lines]
            return [record.to_json() for record in sweep.run(cells)]


def run(
    cells: Sequence[Cell], overrides: Sequence[list[str]], cluster: ClusterSpec, launch: Launch
) -> list[Record]:
    """Have a launcher run each cell whose record does not stand; returns the records of all.

    `overrides` are those that each cell was composed from. Raises as sweep.plan does, before the first job is
    handed over; after that a job that fails, or dies, is told and leaves its cells to the next run.
    """
    jobs = sweep.plan(cells)
    drop_failed_output()
    line_of = {id(cell): line for cell, line in zip(cells, overrides, strict=True)}
    left = [job for job in jobs if job.result is None]
    if before := len(jobs) - len(left):
        _say(f"{before} of {len(jobs)} cells were finished before and are not run again")
    for device in dict.fromkeys(job.cell.spec.device for job in left):
        groups = _pieces([job for job in left if job.cell.spec.device == device], cluster.cells_per_job)
        for batch in _pieces(groups, MOST_JOBS):
            handed = [job for group in batch for job in group]
            _say(f"jobs: {len(batch)}, for {len(handed)} of {len(jobs)} cells")
            # what auto stands for is decided here: a job's machine may have other devices
            lines = [[[*line_of[id(job.cell)], f"device={device}"] for job in group] for group in batch]
            knobs = needs(cluster, [[job.cell for job in group] for group in batch])
            try:
                for returned in launch(knobs, [[f"+{CELLS}={quote(line)}"] for line in lines]):
                    _take(returned, {job.cell_id: job for job in handed})
            except Exception as error:  # whatever a launcher makes of a job that died
                _say(f"the launcher gave up, and other jobs may still be running: {_first_line(error)}")
            for job in handed:
                job.result = job.result or job.meanwhile()
    return sweep.report(jobs)


def needs(cluster: ClusterSpec, groups: Sequence[Sequence[Cell]]) -> ClusterSpec:
    """The knobs for these jobs, on one kind of device, with what was left open filled in."""
    on_cpu = groups[0][0].spec.device == "cpu"
    limits = [sum(cell.spec.measure.limit_seconds + SECONDS_BESIDE for cell in group) for group in groups]
    return replace(
        cluster,
        gpus=int(not on_cpu) if cluster.gpus is None else cluster.gpus,
        cpus=(len(os.sched_getaffinity(0)) if on_cpu else 1) if cluster.cpus is None else cluster.cpus,
        minutes=cluster.minutes or math.ceil(min((SECONDS_TO_START + max(limits)) / 60, A_YEAR)),
    )


def quote(lines: Sequence[Sequence[str]]) -> str:
    """Lists of overrides as a value in Hydra's grammar."""

    def quoted(text: str) -> str:  # a backslash stands for itself, except before a quote
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text)
        return f"'{escaped}'"

    return "[" + ",".join("[" + ",".join(map(quoted, line)) + "]" for line in lines) + "]"


def _pieces(whole: Sequence[T], size: int) -> list[Sequence[T]]:
    return [whole[start : start + size] for start in range(0, len(whole), size)]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _take(returned: list[str] | Exception, jobs: dict[str, Job]) -> None:
    """Give each cell the record that its job returned, and write what is not here yet."""
    if isinstance(returned, Exception):
        _say(f"a job failed: {_first_line(returned)}")
        return
    for text in returned:
        record = records.parse(text, "a job's record")
        job = jobs.get(record.cell_id)
        if job is None:
            _say(f"a job has other code or other data than this machine: {describe(record)}")
            continue
        here = records.read(job.cell.folder, job.cell_id) == record
        job.result = record if here else sweep.keep(job, record)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
