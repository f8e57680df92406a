"""Where the records were measured, as one of the page's tables."""

from __future__ import annotations

import pandas as pd

from bench.report.text.listing import Listed, listed
from bench.report.text.machines import SETTINGS


def environments(frame: pd.DataFrame) -> Listed:
    """One row a machine and set of versions: where the records were measured."""
    keys = ["machine", "cpu_model", "threads", "device", "gpu_driver", *SETTINGS]
    keys += ["torch_version", "python_version", "allocator", "git_commit", "git_dirty"]
    known = frame.assign(git_commit=frame["git_commit"].str[:12])
    known["git_dirty"] = known["git_dirty"].map({True: "yes", False: "no"})
    for key, words in SETTINGS.items():  # as in the head of summary.md
        known[key] = known[key].map(words.format, na_action="ignore")
    known["day"] = known["started_at"].astype("string").str[:10]
    grouped = known.groupby(keys, dropna=False, sort=True)
    rows = grouped.agg(first_day=("day", "min"), last_day=("day", "max"), records=("day", "size"))
    rows = rows.reset_index().dropna(axis="columns", how="all")
    names = {"torch_version": "torch", "python_version": "python", "git_commit": "commit"}
    rows = rows.rename(columns={**names, "cpu_model": "CPU", "git_dirty": "uncommitted changes"})
    return listed(rows, list(rows.columns))
