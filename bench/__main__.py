"""`python -m bench`: run one cell, or with -m a sweep of cells. The only file that runs Hydra.

Exit status:

- 0: every cell is ok or has a stated reason (unsupported, out of memory).
- 1: a cell failed, and the failed cells are listed at the end; or the machine has the device of no cell.
- 2: the command is invalid; the error is one line, and nothing is written.
- 130 or 143: Ctrl-C or SIGTERM stopped the command, which then prints how to resume.

From the first cell on, output that cannot be written is dropped and does not change the status. Before that,
for example for --help, the status is then 141 or 1, as for all commands of this project
(variants.safe_output).
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from bench import CONFIGS
from bench.inputs.printable import printable
from bench.records import FINAL, Record, path_of, profile_path_of
from bench.run.progress import describe, is_without_device
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
    except errors.KINDS as error:  # handled here, because Hydra prints another line if a task raises
        sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
    from bench.cli import errors

    print(f"error: {printable(errors.explain(error, sys.argv[1:], CONFIGS))}", file=sys.stderr)
    return 2


def main() -> int:
    """Run the cells of the command line, or print the help or the version; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises exceptions instead of printing them
    from bench.cli import errors, guard
    from bench.config import folders
    from bench.run import sweep

    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(f"longctx-bench {version('longctx-bench')}")
        return 0
    try:
        sys.argv[1:] = arguments = guard.checked(folders.take(sys.argv[1:]))
        if guard.options(arguments).shell_completion:
            sys.argv[0] = "longctx-bench"  # Hydra completes the command of this name, and not all of python
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
    """Print how to resume; returns the exit status by which shells report this signal."""
    print(f"stopped by {by.name}; finished cells are kept. To run the remaining cells:", file=sys.stderr)
    print(f"  {shlex.join(sys.orig_argv)}", file=sys.stderr)
    return 128 + by


def _summary(finished: list[tuple[Path, Record]]) -> int:
    """Print the result of a single cell, or the failed cells of a sweep; returns the exit status."""
    failed = [record for _, record in finished if record.status not in FINAL]
    absent = [record for _, record in finished if is_without_device(record)]
    if len(finished) == 1:
        folder, record = finished[0]
        print(describe(record))
        print(path_of(folder, record.cell_id))
        if (profile := profile_path_of(folder, record.cell_id)).is_file():
            print(f"{profile.with_suffix('.json.gz')}\n\n{profile.read_text()}", end="")
    elif failed:
        print(f"{len(failed)} of {len(finished)} cells failed:", file=sys.stderr)
        for record in failed:
            print(f"  {describe(record)}", file=sys.stderr)
    if contaminated := sum(record.contaminated is not None for _, record in finished):
        print(
            f"{contaminated} of {len(finished)} cells are contaminated, so their times are not reliable; "
            "the same command with rerun=contaminated measures them again",
            file=sys.stderr,
        )
    if absent and len(absent) == len(finished):
        print(
            f"error: no cell could run: this machine has no device={absent[0].device}; measure=plan predicts "
            "without one",
            file=sys.stderr,
        )
        return 1
    return 1 if failed else 0


def _lost(unrecorded: list[Cell]) -> int:
    """Print the cells without a record; returns the exit status."""
    if unrecorded:
        print(f"cells without a record: {len(unrecorded)}; the same command runs them:", file=sys.stderr)
        for cell in unrecorded:
            print(f"  {cell.spec.label}", file=sys.stderr)
    return 1 if unrecorded else 0


if __name__ == "__main__":
    run(main)
