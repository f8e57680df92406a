"""What the page's script works on: the cells and figures of a report as one JSON document."""

from __future__ import annotations

import pandas as pd

from bench.report import markdown, tables, units
from bench.report.groups import COMMON, describe, split, varying
from bench.report.lines import replicates
from bench.report.page import cells, figures
from bench.report.page.figures import Json
from bench.report.page.symbols import symbols
from bench.report.style import strategy_rank, styles
from bench.report.summary import Found


def data(frame: pd.DataFrame, found: Found) -> Json:
    """The document: lists with one entry a cell, and what is made of them.

    `settings` are what cells must share to be compared, all but the way of saving activations; `setting`
    is each cell's place among them. `score` is what ranks quality, the accuracy where `accurate`, else the
    perplexity. For `table` see `cells.table`, for `figures` and `pareto` see `figures`.
    """
    rows = cells.rows(found.cost, found.quality)
    settings = list(split(rows, COMMON)) if len(rows) else []
    apart = varying(rows, COMMON) if len(rows) else []
    places = {tuple(values[key] for key in COMMON): place for place, (values, _) in enumerate(settings)}
    looks = styles(zip(frame["variant"], frame["label"], strict=True))
    peaks = [tables.peak(row) for _, row in rows.iterrows()]
    return {
        "settings": [describe(values, apart) or describe(values, COMMON) for values, _ in settings],
        "tasks": [describe(values, ("objective", "corpus")) for values, _ in settings],
        "setting": [places[key] for key in rows[list(COMMON)].itertuples(index=False, name=None)],
        "label": list(rows["label"]),
        "leaks": [bool(leaks) for leaks in rows["leaks"]],
        "activations": list(rows["activations"]),
        "depth": [int(depth) for depth in rows["depth"]],
        "length": [int(length) for length in rows["seq_len"]],
        "status": list(rows["status"]),
        "reason": ["" if pd.isna(reason) else markdown.shortened(reason) for reason in rows["reason"]],
        "finished": [int(count) for count in rows["finished"]],
        "records": [int(count) for count in rows["records"]],
        "replicate_counts": [int(count) for count in rows["replicates"].fillna(0)],
        "replicates": replicates(rows["replicates"].fillna(0).astype(int)),
        "memory": figures.numbers(rows["peak_shown"]),
        "memory_text": peaks,
        "predicted": [text.endswith(tables.PREDICTED) for text in peaks],
        "seconds": figures.numbers(rows["step_seconds_median"]),
        "seconds_text": [units.seconds(value) for value in rows["step_seconds_median"]],
        "rate_text": [units.rate(value) for value in rows["tokens_per_second_median"]],
        "flops": figures.numbers(rows["flops_executed_step"]),
        "flops_text": [units.flops(value) for value in rows["flops_executed_step"]],
        "score": figures.numbers(rows["score"]),
        "score_text": [cells.score(row) for _, row in rows.iterrows()],
        "accurate": [bool(accurate) for accurate in rows["accuracy_mean"].notna()],
        "trained": list(rows["trained"]),
        "lengths": dict(figures.lengths(list(rows["seq_len"]))),
        "strategies": sorted(rows["activations"].unique(), key=lambda name: (strategy_rank(name), name)),
        "table": cells.table(rows),
        "figures": figures.cost_figures(rows),
        "pareto": figures.pareto_figures(found.findings.pareto, places),
        "styles": symbols({label: looks[label] for label in dict.fromkeys(rows["label"])}),
    }
