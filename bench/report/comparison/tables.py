"""compare.md: two runs side by side, and the cells that only one of them has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bench.records.configurations import UNKNOWN
from bench.report.comparison.matching import SETTING, Comparison, Run
from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import RATIO_DISTURBED
from bench.report.data.groups import TRAINING, varying
from bench.report.data.noise_floor import Floor
from bench.report.figures.drawing import Plots
from bench.report.text import markdown, units
from bench.report.text.cells import time_title, training_columns
from bench.report.text.columns import Column, each
from bench.report.text.machines import dates, machines
from bench.report.text.markdown import escape
from bench.report.text.marks import ALIKE, CONTAMINATED, OF_TWO, UNTOLD, disturbed, marked_range
from bench.report.text.marks import NOTES as MEANINGS
from bench.report.text.phrases import headed

NOTES = {
    ALIKE: "not called different: an end of the ratio's interval lies within the larger noise floor (its "
    "upper bound), or the difference does not pass Holm's correction over all cells of the comparison",
    UNTOLD: "nothing says whether they differ: one replicate, or two and no noise floor",
    OF_TWO: MEANINGS[OF_TWO],
    CONTAMINATED: "timed while something else ran, and there is no undisturbed measurement; of a ratio, this "
    "holds for either side",
}
LEAD = (
    "Ratios are the second run over the first, the median over the replicates that both have, each against "
    "the same replicate. The rounds of the two were not interleaved: a difference in time may be the "
    "machine's drift. *loss* is the change of the mean loss in nats, with its interval over replicates."
)


def text(comparison: Comparison, plots: Plots) -> str:
    """The whole of compare.md."""
    first, second = comparison.runs
    parts = [f"# {escape(first.name)} and {escape(second.name)}\n", markdown.table(_head(comparison))]
    parts += [markdown.image(plot.title, plot.path) for plot in plots.get("compare", ())]
    tables = [
        f"### {escape(heading)}\n\n{escape(words)}\n\n{_cells(group)}"
        for heading, words, group in (headed(comparison.cells, SETTING) if len(comparison.cells) else ())
    ]
    body = "\n".join(tables) or "No cell of one run is also in the other.\n"
    parts.append(markdown.section("Side by side", body, NOTES, LEAD))
    for place, run in enumerate(comparison.runs):
        unmatched = comparison.unmatched[comparison.unmatched["run"] == place]
        if len(unmatched):
            parts.append(markdown.section(f"Only in {escape(run.name)}", _alone(unmatched), {}))
    return "\n".join(parts)


def _head(comparison: Comparison) -> list[Column]:
    """A row a fact, a column a run."""
    facts = [_facts(run) for run in comparison.runs]
    names = ("first", "second")
    return [
        Column("", list(facts[0]), right=False, optional=False),
        *(
            Column(f"{name}: {run.name}", list(of.values()), right=False, optional=False)
            for name, run, of in zip(names, comparison.runs, facts, strict=True)
        ),
    ]


def _facts(run: Run) -> dict[str, str]:
    frame = run.collected.frame
    commits = sorted({str(c)[:10] for c in frame["git_commit"].dropna()})
    return {
        "machine": machines(frame),
        "dates": dates(frame),
        "torch": ", ".join(sorted(frame["torch_version"].dropna().unique())) or UNKNOWN,
        "commit": ", ".join(commits) or UNKNOWN,
        "cells": str(len(frame)),
        "noise floor": _floor(run.floor),
    }


def _floor(floor: Floor) -> str:
    if not floor.method:
        return "unknown, no A/A cells"
    estimate, upper = (units.above_one(float(np.exp(value))) for value in (floor.estimate, floor.upper))
    return f"{estimate}, at most {upper}"


def _cells(cells: pd.DataFrame) -> str:
    rows = [row for _, row in cells.iterrows()]
    ends = [units.ratios(r[f"{SECONDS}_ratio_low"], r[f"{SECONDS}_ratio_high"]) for r in rows]
    return markdown.table(
        [
            each(cells, "variant", "label", str, right=False, optional=False),
            each(cells, "length", "seq_len", str, optional=False),
            *training_columns(cells, varying(cells, TRAINING)),
            Column(f"{time_title(cells)}, first", [_time(row, "first") for row in rows]),
            Column("second", [_time(row, "second") for row in rows]),
            Column("ratio", [units.ratio(r[f"{SECONDS}_ratio"]) + _mark(r) for r in rows]),
            Column("95 % interval", marked_range(ends, cells["rounds"], cells[RATIO_DISTURBED])),
            each(cells, "peak memory, first", "peak_bytes_first", units.size),
            each(cells, "second", "peak_bytes_second", units.size),
            each(cells, "ratio", "peak_bytes_ratio", units.ratio),
            each(cells, "executed FLOPs, ratio", "flops_executed_ratio", units.ratio),
            each(cells, "bits per byte, first", "bits_per_byte_first", units.score),
            each(cells, "second", "bits_per_byte_second", units.score),
            each(cells, "perplexity, first", "perplexity_first", units.score),
            each(cells, "second", "perplexity_second", units.score),
            each(cells, "accuracy, first", "accuracy_first", units.share),
            each(cells, "second", "accuracy_second", units.share),
            Column("loss", [_change(row) for row in rows]),
            Column("data", [units.MISSING if same else "differ" for same in cells["same_data"]], right=False),
            each(cells, "rounds", "rounds", str, optional=False),
            Column("status", [_status(row) for row in rows], right=False),
        ]
    )


def _status(row: pd.Series[Any]) -> str:
    first, second = row["status_first"], row["status_second"]
    return units.MISSING if first == second == "ok" else f"{first} → {second}"


def _mark(row: pd.Series[Any]) -> str:
    if pd.isna(row[f"{SECONDS}_ratio"]):
        return ""
    mark = UNTOLD if pd.isna(row["differs"]) else "" if row["differs"] else ALIKE
    return mark + (CONTAMINATED if row[RATIO_DISTURBED] else "")


def _time(row: pd.Series[Any], run: str) -> str:
    return disturbed(row, f"{SECONDS}_{run}", units.seconds, f"disturbed_{run}")


def _change(row: pd.Series[Any]) -> str:
    """'+0.012 (−0.003 to 0.027)' in nats."""
    if pd.isna(row["nll_change"]):
        return units.MISSING
    words = f"{row['nll_change']:+.4f}"
    if pd.isna(row["nll_change_low"]):
        return words
    return f"{words} ({row['nll_change_low']:+.4f} to {row['nll_change_high']:+.4f})"


def _alone(cells: pd.DataFrame) -> str:
    varying_keys = [key for key in varying(cells, SETTING) if key != "depth"]
    return markdown.table(
        [
            each(cells, "variant", "label", str, right=False, optional=False),
            each(cells, "length", "seq_len", str, optional=False),
            each(cells, "depth", "depth", str, optional=False),
            *(each(cells, key, key, str, right=False) for key in varying_keys),
            *training_columns(cells, varying(cells, TRAINING)),
        ]
    )
