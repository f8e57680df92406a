"""`python -m bench.survey [results/<name>] [--out FILE]`: the survey of Tay et al. beside the variants here.

Prints the page, or writes it to a file. With the folder of an experiment, the exponents of its records stand
beside the claims. Exit status: 0 if the page is written, 2 if there are no records.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from variants.safe_output import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.survey",
        description="The table of the survey of efficient transformers (Tay et al., arXiv:2009.06732v3), "
        "with the variants here: their claims, capabilities and measured exponents.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="an experiment's folder, such as results/scaling"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the page to this file, such as docs/survey.md"
    )
    options = parser.parse_args(arguments)

    from bench.records import write_atomically
    from bench.report import ReportError
    from bench.survey.page import installed, measured, of_records, page, without_records

    try:
        found = measured(options.folder) if options.folder else {}
        every = installed()
        origin = of_records(options.folder.resolve(), found, every) if options.folder else without_records()
        text = page(every, found, origin)
        if options.out is None:
            print(text, end="")
        else:
            write_atomically(options.out, text)
    except (ReportError, OSError) as error:
        print(f"bench.survey: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run(main)
