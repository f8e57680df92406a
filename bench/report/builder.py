"""One experiment's report from its records: reads them, computes every section, writes every file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import atomic_writer, write_atomically
from bench.report import page, summary
from bench.report.comparison import matching
from bench.report.comparison import tables as comparison_tables
from bench.report.data.experiment import read
from bench.report.data.files import csv, parquet
from bench.report.data.groups import SETTING
from bench.report.figures.drawing import Plots
from bench.report.sections import Results, Section, compute, discover
from bench.report.staging import replacing_files

MANY = 2000
"""Records from which on a plot for every setting takes longer than people wait."""
MANY_SETTINGS = 24
"""Settings from which on it does too. A run of modifications has one for each model and task."""
PICTURES = ("plots/*.png", "plots/*.svg")

log = logging.getLogger("bench.report")


def build_report(
    folder: Path,
    *,
    plots: bool = True,
    all_plots: bool = False,
    all_variants: bool = False,
    tex_columns: Sequence[str] | None = None,
    sections: Sequence[Section[Any]] | None = None,
) -> Path:
    """See `bench.report.build`; `sections` are those of `bench.report.sections` unless given."""
    results = compute(read(folder), discover() if sections is None else sections)
    problems = results.records.collected.problems
    problems.extend(problem for section, data in results for problem in section.problems(data))
    for problem in problems:
        log.warning("left out: %s", problem)
    # Files that an earlier report may have written: those that are not written again are removed.
    own = (*PICTURES, *(f"{name}.csv" for section in results.sections for name in section.csv))
    report = folder / "report"
    with replacing_files(report, own) as new:
        pictures: Plots = {}
        notes: Sequence[str] = []
        if plots:
            pictures, notes = _draw(new, results, all_plots=all_plots, all_variants=all_variants)
        _write(new, results, pictures, notes, tex_columns=tex_columns)
    return report


def _draw(
    report: Path, results: Results, *, all_plots: bool, all_variants: bool
) -> tuple[Plots, Sequence[str]]:
    """Draw the figures; also returns notes on what is not drawn."""
    from bench.report.figures.drawing import draw_all
    from bench.report.figures.selection import MOST

    frame = results.records.collected.frame
    is_large = len(frame) > MANY or frame.groupby(list(SETTING), dropna=False).ngroups > MANY_SETTINGS
    many = is_large and not all_plots
    figures = {section.name: section.figures(data) for section, data in results}
    kinds = results.records.kinds
    pictures, undrawn = draw_all(
        figures, frame, kinds, report, 1 if many else None, None if all_variants else MOST
    )
    if not undrawn:
        return pictures, []
    return pictures, [
        f"{undrawn} plots are not drawn: with more than {MANY:,} records or {MANY_SETTINGS} settings there "
        "is one of each kind, of the setting with the most cells; python -m bench.report --all-plots draws "
        "them all"
    ]


def _write(
    report: Path,
    results: Results,
    pictures: Plots,
    notes: Sequence[str],
    *,
    tex_columns: Sequence[str] | None,
) -> None:
    """Every file of a report, but for its figures, into a folder."""
    collected = results.records.collected
    for section, data in results:
        for name, table in section.csv_tables(data).items():
            if name not in section.csv:
                raise ValueError(f"section {section.name!r} writes {name}.csv, which its csv does not name")
            write_atomically(report / f"{name}.csv", csv(table))
    write_atomically(report / "summary.md", summary.text(results, pictures, notes))
    write_atomically(report / "summary.tex", summary.tex(results, tex_columns))
    write_atomically(report / "index.html", page.html(results))
    with atomic_writer(report / "cells.parquet") as file:
        file.write(parquet(collected.records, collected.stale))


def build_comparison(first: Path, second: Path, *, plots: bool = True) -> Path:
    """See `bench.report.compare`."""
    runs = matching.load(first), matching.load(second)
    comparison = matching.compare(*runs)
    folder = second / "report" / f"against-{runs[0].name}"
    with replacing_files(folder, PICTURES) as new:
        pictures: Plots = {}
        if plots and len(comparison.cells):
            from bench.report.comparison.plots import draw

            pictures = draw(comparison, new)
        write_atomically(new / "compare.csv", csv(comparison.cells))
        write_atomically(new / "compare.md", comparison_tables.text(comparison, pictures))
    return folder
