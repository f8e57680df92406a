"""summary.tex: the tables of cost and quality for a paper, with the same figures as summary.md."""

from __future__ import annotations

import pandas as pd

from bench.report import interval_cells, latex, tables
from bench.report.collect import Collected
from bench.report.statistics import LEAK_LIMIT
from bench.report.summary import Found, dates, machines

NOTES = {
    tables.LEAK: f"sees the future: the gate measured a leak of more than {LEAK_LIMIT:g}",
    tables.PREDICTED: "predicted, not measured",
    **interval_cells.NOTES,
}


def text(collected: Collected, found: Found) -> str:
    """The whole of summary.tex: one floating table a setting, to be read by \\input."""
    frame = collected.frame
    when = dates(frame)
    names = ", ".join(sorted(frame["name"].unique()))
    head = (
        f"% {' '.join(names.split())}: {' '.join(machines(frame).split())}; {when}\n"
        "% \\usepackage{booktabs,graphicx}, then \\input this file.\n"
    )
    parts = [
        latex.table(
            tables.cost(group),
            caption=f"Cost of a training step: {keys}. Medians over replicates, {when}.",
            label=f"tab:cost-{number}",
            notes=NOTES,
        )
        for number, (_, keys, group) in enumerate(tables.headed(found.cost), 1)
    ]
    modelled = found.quality[found.quality["accuracy_mean"].isna()]
    parts += [
        latex.table(
            tables.quality(group),
            caption=f"Quality: {heading}. Mean and standard deviation over replicates, {when}.",
            label=f"tab:quality-{number}",
            notes=NOTES,
        )
        for number, (_, heading, group) in enumerate(_headed(modelled), 1)
    ]
    return "\n".join([head, *parts])


def _headed(modelled: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    return [] if modelled.empty else tables.headed(modelled, ("objective", "corpus"))
