"""`python -m bench.records check|compact results/<name>`: maintain the records of an experiment.

Exit status: 0 if every record can be read, 1 if a file cannot be read, 2 if the folder does not exist or
cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.inputs.printable import printable
from variants.safe_output import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.records", description="Maintain records.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (
        ("check", "list problems: unreadable, older, stale, duplicate or misnamed records, leftover files"),
        ("compact", "combine single files into a few large ones, and remove the leftovers of dead processes"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("folder", type=Path, help="the experiment's folder, such as results/scaling")
    options = parser.parse_args(arguments)
    try:
        if not options.folder.is_dir():
            print(f"bench.records: {printable(options.folder)}: no such folder", file=sys.stderr)
            return 2
        return _check(options.folder) if options.command == "check" else _compact(options.folder)
    except OSError as error:
        print(f"bench.records: {printable(error)}", file=sys.stderr)
        return 2


def _check(folder: Path) -> int:
    from bench.records.check import check

    problems = check(folder)
    for problem in problems:
        print(f"{problem.kind:10} {problem.text}")
    counts = Counter(problem.kind for problem in problems)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing is wrong")
    return int(any(problem.loses_record for problem in problems))


def _compact(folder: Path) -> int:
    from bench.records.compact import compact

    done = compact(folder)
    for problem in done.problems:
        print(f"left unchanged: {problem}")
    print(
        f"{done.gathered} single files combined; there are {len(done.parts)} parts now; "
        f"{done.temporaries} temporary files of dead processes removed"
    )
    return int(bool(done.problems))


if __name__ == "__main__":
    run(main)
