"""`python -m bench`: run one cell, or with -m a sweep of them. The only file that runs Hydra.

Exit status: 0 when every cell is ok or has a stated reason (unsupported, out of memory); 1 when a
cell failed, with a list at the end; 2 for a mistake in the command, in one line, with nothing written;
130 or 143 where Ctrl-C or SIGTERM stopped it, and then it says how to go on. Once cells are measured,
output that cannot be written is dropped and changes no status. Before that, as for --help, the status is
141 or 1, as of every command here (variants.safe_output).
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from bench import CONFIGS
from bench.inputs.printable import printable
from bench.records import FINAL, Record, path_of
from bench.run.progress import describe
from variants.safe_output import run

if TYPE_CHECKING:
    from bench.config.spec import Cell


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def _task(cfg: DictConfig) -> None:
    from bench.cli import errors
    from bench.config import parse
    from bench.run import sweep

    try:
        sweep.run([parse.parse(cfg)])
    except errors.KINDS as error:  # here, because Hydra prints a line of its own when a task raises
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    from bench.cli import errors

    print(f"error: {printable(errors.explain(error, sys.argv[1:], CONFIGS))}", file=sys.stderr)
    return 2


def main() -> int:
    """Run what the command line says; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed
    from bench.cli import errors, guard
    from bench.run import sweep

    try:
        sys.argv[1:] = arguments = guard.checked(sys.argv[1:])
        if guard.options(arguments).help:
            from bench.cli import help

            print(help.text(guard.options(arguments).overrides, CONFIGS))
            return 0
        _task()
    except errors.KINDS as error:
        return _refuse(error)
    except KeyboardInterrupt as stop:
        return _stopped(getattr(stop, "signal", signal.SIGINT))
    return max(_summary(sweep.finished), _lost(sweep.unrecorded))


def _stopped(by: signal.Signals) -> int:
    """Say how to go on; the exit status that a shell gives to what a signal ended."""
    print(f"stopped by {by.name}; what is finished is kept. To go on with the rest:", file=sys.stderr)
    print(f"  {shlex.join(sys.orig_argv)}", file=sys.stderr)
    return 128 + by


def _summary(finished: list[tuple[Path, Record]]) -> int:
    """Print one cell's row, or a sweep's failures; the exit status."""
    failed = [record for _, record in finished if record.status not in FINAL]
    if len(finished) == 1:
        folder, record = finished[0]
        print(describe(record))
        print(path_of(folder, record.cell_id))
    elif failed:
        print(f"{len(failed)} of {len(finished)} cells failed:", file=sys.stderr)
        for record in failed:
            print(f"  {describe(record)}", file=sys.stderr)
    if spoilt := sum(record.contaminated is not None for _, record in finished):
        print(
            f"{spoilt} of {len(finished)} cells are contaminated: their times are not to be trusted; "
            "the same command with rerun=contaminated measures them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _lost(unrecorded: list[Cell]) -> int:
    """Print the cells that have no record; the exit status."""
    if unrecorded:
        print(f"no record of {len(unrecorded)} of the cells; the same command runs them:", file=sys.stderr)
        for cell in unrecorded:
            print(f"  {cell.spec.label}", file=sys.stderr)
    return 1 if unrecorded else 0


if __name__ == "__main__":
    run(main)
