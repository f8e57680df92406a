"""One experiment's report from its records: reads, aggregates, writes every file."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from bench.records import RECORDS_DIR, replacing, write_atomically
from bench.report import (
    ReportError,
    budgets,
    comparison,
    comparison_tables,
    curves,
    findings,
    memory,
    noise,
    page,
    rates,
    recall,
    statistics,
    summary,
    summary_tex,
    tables,
)
from bench.report.collect import Collected, collect
from bench.report.staging import replacing_files

MANY = 2000
"""Records from which on a plot for every setting takes longer than people wait."""

AGGREGATES = ("recomputation", "fits", "payoff", "rates", "recall", "noise")
FINDINGS = ("exponents", "crossovers", "pareto")
"""Tables that are there only if they have rows."""
PICTURES = ("plots/*.png", "plots/*.svg")
OWN = (*PICTURES, *(f"{name}.csv" for name in (*AGGREGATES, *FINDINGS)))
"""What an earlier report may have left, of which nothing outlives its data."""

log = logging.getLogger("bench.report")


def build_report(folder: Path, *, plots: bool = True, all_plots: bool = False) -> Path:
    """See `bench.report.build`."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    collected = collect(folder)
    if not collected.every.empty and collected.frame.empty:
        raise ReportError(f"{folder}: only twins; measure the same cells with twin=0 too")
    if collected.frame.empty:
        unread = f" ({len(collected.problems)} files there cannot be read)" if collected.problems else ""
        raise ReportError(f"{folder}: no records in {folder / RECORDS_DIR}{unread}")
    for problem in collected.problems:
        log.warning("left out: %s", problem)
    kinds = budgets.kinds(collected.frame)
    pairs = noise.pairs(collected.every)
    cost = statistics.cost_cells(kinds.plain, noise.floors(pairs))
    quality = statistics.quality_cells(kinds.plain)
    rate = rates.rate_cells(kinds.plain, quality)
    training, unread_curves = curves.training_curves(kinds.plain, folder)
    for problem in unread_curves:
        log.warning("left out: %s", problem)
    collected.problems.extend(unread_curves)
    found = summary.Found(
        cost=cost,
        quality=quality,
        parts=memory.peak_parts(kinds.plain),
        recomputation=memory.recomputation(kinds.plain),
        predictions=memory.prediction_errors(collected.frame),
        fits=budgets.fits_cells(kinds.fits),
        payoff=budgets.payoff_cells(kinds.payoff),
        rates=rate,
        recall=recall.recall_cells(kinds.plain, rate),
        curves=training,
        findings=findings.find(kinds.plain, cost, quality),
        noise=noise.summary(pairs, cost),
    )
    report = folder / "report"
    with replacing_files(report, OWN) as new:
        _write(new, collected, kinds, found, plots=plots, all_plots=all_plots)
    return report


def _write(
    report: Path,
    collected: Collected,
    kinds: budgets.Kinds,
    found: summary.Found,
    *,
    plots: bool,
    all_plots: bool,
) -> None:
    """Every file of a report into a folder that has none yet."""
    pictures: findings.Plots = {}
    notes: list[str] = []
    if plots:
        from bench.report.plots import draw_all

        many = len(collected.frame) > MANY and not all_plots
        pictures, left = draw_all(collected.frame, kinds, found, report, 1 if many else None)
        if left:
            notes.append(
                f"{left} plots are not drawn: with more than {MANY:,} records there is one of each kind, of "
                "the setting with the most cells; python -m bench.report --all-plots draws them all"
            )
    write_atomically(report / "summary.csv", tables.csv(statistics.summary(found.cost, found.quality)))
    for name in AGGREGATES:
        _write_if_any(report / f"{name}.csv", getattr(found, name))
    for name in FINDINGS:
        _write_if_any(report / f"{name}.csv", getattr(found.findings, name))
    write_atomically(report / "summary.md", summary.text(collected, found, pictures, notes))
    write_atomically(report / "summary.tex", summary_tex.text(collected, found))
    write_atomically(report / "index.html", page.html(collected, found))
    with replacing(report / "cells.parquet") as file:
        file.write(tables.parquet(collected.records, collected.stale))


def build_comparison(first: Path, second: Path, *, plots: bool = True) -> Path:
    """See `bench.report.compare`."""
    runs = comparison.load(first), comparison.load(second)
    found = comparison.compare(*runs)
    folder = second / "report" / f"against-{runs[0].name}"
    with replacing_files(folder, PICTURES) as new:
        pictures: findings.Plots = {}
        if plots and len(found.cells):
            from bench.report.comparison_plots import draw

            pictures = draw(found, new)
        write_atomically(new / "compare.csv", tables.csv(found.cells))
        write_atomically(new / "compare.md", comparison_tables.text(found, pictures))
    return folder


def _write_if_any(path: Path, table: pd.DataFrame) -> None:
    """The table as CSV, less what is no single figure; no file where it has no rows."""
    table = table.drop(columns=["data_params", "distance_edges", "accuracy_by_distance"], errors="ignore")
    if not table.empty:
        write_atomically(path, tables.csv(table))
