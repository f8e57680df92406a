"""Records into a report: statistics over replicates, tables and plots; never imports torch.

Importing this package costs nothing: pandas and matplotlib load when a report is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class ReportError(ValueError):
    """No records to report on; the message is one line and names the folder."""


def build(
    folder: Path,
    *,
    plots: bool = True,
    all_plots: bool = False,
    all_variants: bool = False,
    tex_columns: Sequence[str] | None = None,
) -> Path:
    """Rebuild `folder`/report from `folder`/records and return the path of the report.

    `folder` is an experiment's folder, such as results/scaling. With `plots` False only the tables are
    written; `all_plots` draws every figure however many records there are, and `all_variants` every variant
    in each of them instead of dense and the best of each family. `tex_columns`
    are the titles of the columns of figures in summary.tex; None is all. Record files that cannot be read
    are logged as warnings, named in summary.md and skipped. Raises ReportError for a folder that is missing
    or has no record, and for a title that no column has.
    """
    from bench.report.builder import build_report

    return build_report(
        Path(folder), plots=plots, all_plots=all_plots, all_variants=all_variants, tex_columns=tex_columns
    )


def compare(first: Path, second: Path, *, plots: bool = True) -> Path:
    """Set two experiments side by side, such as one of two machines or of two commits.

    Writes compare.md, compare.csv and plots into `second`/report/against-<name of the first> and returns
    that folder. Raises ReportError where either has no records, or records of several machines.
    """
    from bench.report.builder import build_comparison

    return build_comparison(Path(first), Path(second), plots=plots)
