"""One experiment's report from its records: reads, aggregates, writes every file."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from bench.records import RECORDS_DIR, write_atomically
from bench.report import ReportError, statistics, summary, tables
from bench.report.collect import collect

log = logging.getLogger("bench.report")


def build_report(folder: Path, *, plots: bool = True) -> Path:
    """See `bench.report.build`."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder")
    collected = collect(folder)
    if collected.frame.empty:
        unread = f" ({len(collected.problems)} files there cannot be read)" if collected.problems else ""
        raise ReportError(f"{folder}: no records in {folder / RECORDS_DIR}{unread}")
    for problem in collected.problems:
        log.warning("left out: %s", problem)
    cost = statistics.cost_cells(collected.frame)
    quality = statistics.quality_cells(collected.frame)
    report = folder / "report"
    pictures: summary.Plots = {}
    _clear(report / "plots")
    if plots:
        from bench.report.plots import draw_all

        pictures = draw_all(collected.frame, cost, quality, report)
    write_atomically(report / "summary.csv", tables.csv(statistics.summary(cost, quality)))
    write_atomically(report / "summary.md", summary.text(collected, cost, quality, pictures))
    _write_bytes(report / "cells.parquet", tables.parquet(collected.records))
    return report


def _clear(folder: Path) -> None:
    """Remove the pictures of an earlier report, so that none outlives its data."""
    for pattern in ("*.png", "*.svg"):
        for path in folder.glob(pattern):
            path.unlink()


def _write_bytes(path: Path, content: bytes) -> None:
    """As records.write_atomically, for bytes."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)
