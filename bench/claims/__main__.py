"""`python -m bench.claims results/claims`: check the claims against an experiment's records; writes
`claims.md`.

Exit status: 0 if it is written, 2 if there are no records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from variants.safe_output import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, judge the claims and write `claims.md` into the folder;
    returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.claims",
        description="Check claims of the literature against an experiment's records.",
    )
    parser.add_argument("folder", type=Path, help="the experiment's folder, such as results/claims")
    folder: Path = parser.parse_args(arguments).folder

    from bench.claims.page import page
    from bench.records import RECORDS_DIR, write_atomically
    from bench.report.data.collect import collect

    try:
        if not folder.is_dir():
            return _refuse(f"{folder}: no such folder")
        collected = collect(folder)
        if collected.frame.empty:
            return _refuse(f"{folder}: no records in {folder / RECORDS_DIR}; make claims measures them")
        for problem in collected.problems:
            print(f"left out: {problem}", file=sys.stderr)
        write_atomically(folder / "claims.md", page(folder.resolve().name, collected.frame))
    except OSError as error:
        return _refuse(str(error))
    print(f"claims: {folder / 'claims.md'}")
    return 0


def _refuse(why: str) -> int:
    print(f"bench.claims: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    run(main)
