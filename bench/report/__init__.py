"""Records into a report: statistics over replicates, tables and plots; never imports torch.

Importing this package costs nothing: pandas and matplotlib load when a report is built.
"""

from __future__ import annotations

from pathlib import Path


class ReportError(ValueError):
    """There is nothing to report on; the message is one line and names the folder."""


def build(folder: Path, *, plots: bool = True, all_plots: bool = False) -> Path:
    """Rebuild `folder`/report from `folder`/records and return the path of the report.

    `folder` is an experiment's folder, such as results/scaling. With `plots` False only the tables are
    written; with `all_plots` every plot, however many records there are. Record files that cannot be read
    are logged as warnings, named in summary.md and skipped. Raises ReportError for a folder that is
    missing or has no record.
    """
    from bench.report.builder import build_report

    return build_report(Path(folder), plots=plots, all_plots=all_plots)
