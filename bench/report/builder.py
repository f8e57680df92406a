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
from bench.report.collect import collect

MANY = 2000
"""Records from which on a plot for every setting takes longer than people wait."""

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
    pictures: findings.Plots = {}
    notes: list[str] = []
    _clear(report / "plots")
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
    for name in ("recomputation", "fits", "payoff", "rates", "recall", "noise"):
        _write_if_any(report / f"{name}.csv", getattr(found, name))
    for name in ("exponents", "crossovers", "pareto"):
        _write_if_any(report / f"{name}.csv", getattr(found.findings, name))
    write_atomically(report / "summary.md", summary.text(collected, found, pictures, notes))
    write_atomically(report / "summary.tex", summary_tex.text(collected, found))
    write_atomically(report / "index.html", page.html(collected, found))
    with replacing(report / "cells.parquet") as file:
        file.write(tables.parquet(collected.records, collected.stale))
    return report


def build_comparison(first: Path, second: Path, *, plots: bool = True) -> Path:
    """See `bench.report.compare`."""
    runs = comparison.load(first), comparison.load(second)
    found = comparison.compare(*runs)
    folder = second / "report" / f"against-{runs[0].name}"
    pictures: findings.Plots = {}
    _clear(folder / "plots")
    if plots and len(found.cells):
        from bench.report.comparison_plots import draw

        pictures = draw(found, folder)
    write_atomically(folder / "compare.csv", tables.csv(found.cells))
    write_atomically(folder / "compare.md", comparison_tables.text(found, pictures))
    return folder


def _write_if_any(path: Path, table: pd.DataFrame) -> None:
    """The table as CSV, less what is no single figure; no file where it has no rows."""
    table = table.drop(columns=["data_params", "distance_edges", "accuracy_by_distance"], errors="ignore")
    if table.empty:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, tables.csv(table))


def _clear(folder: Path) -> None:
    """Remove the pictures of an earlier report, so that none outlives its data."""
    for pattern in ("*.png", "*.svg"):
        for path in folder.glob(pattern):
            path.unlink()
