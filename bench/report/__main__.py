"""`python -m bench.report results/<name>`: rebuild the report of one experiment; of two, compare them.

Exit status: 0 when the report is written, 2 when there are no records to report on; 130, 143 or 129 after
Ctrl-C, SIGTERM or a closed terminal, and then the report is unchanged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.process.signals import Stopped
from bench.report import ReportError, build, compare
from variants.safe_output import run


def shown(path: Path) -> str:
    """The path relative to the current directory where it lies below it, else as it is."""
    absolute = path.resolve()
    here = Path.cwd().resolve()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, build the report and print its path; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description="Rebuild the tables and plots of an experiment from its records, "
        "or set two experiments side by side.",
    )
    parser.add_argument("folder", type=Path, help="the experiment's folder, such as results/scaling")
    parser.add_argument(
        "second", type=Path, nargs="?", help="another one: ratios of its figures to the first's are written"
    )
    parser.add_argument("--no-plots", action="store_true", help="write the tables only, which is faster")
    parser.add_argument(
        "--all-plots", action="store_true", help="draw every plot of thousands of records too"
    )
    parser.add_argument(
        "--all-variants",
        action="store_true",
        help="draw every variant in every plot; else one of many has dense and the best of each family",
    )
    parser.add_argument(
        "--tex-columns",
        metavar="TITLES",
        help="columns of figures in summary.tex, with commas between them, such as 'step time,time / dense'",
    )
    options = parser.parse_args(arguments)
    titles = (
        None if options.tex_columns is None else [title.strip() for title in options.tex_columns.split(",")]
    )
    try:
        if options.second:
            side_by_side = compare(options.folder, options.second, plots=not options.no_plots)
            print(f"comparison: {shown(side_by_side / 'compare.md')}")
            return 0
        report = build(
            options.folder,
            plots=not options.no_plots,
            all_plots=options.all_plots,
            all_variants=options.all_variants,
            tex_columns=titles,
        )
    except Stopped as stop:
        print(f"bench.report: stopped by {stop.signal.name}; the report is as it was before", file=sys.stderr)
        return 128 + stop.signal
    except (ReportError, OSError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return 2
    images = len(list((report / "plots").glob("*.png")))
    print(f"report: {shown(report / 'summary.md')}")
    print(f"page:   {shown(report / 'index.html')} (open it in a browser; it needs no network)")
    print(f"also:   summary.csv, summary.tex, cells.parquet and {images} plots (png, svg) in {shown(report)}")
    return 0


if __name__ == "__main__":
    run(main)
