"""The page's plain tables: what did not finish, what was disturbed, what fits, on what it ran."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from bench.report import budget_tables, noise_tables, tables, units
from bench.report.groups import FIT, GROUP, PAYOFF, SETTING, TRAINING, varying
from bench.report.interval_cells import interval, timed
from bench.report.markdown import shortened

TITLES = {"label": "variant", "seq_len": "length", "d_model": "width", "batch_size": "batch"}


@dataclass(frozen=True)
class Listed:
    """A table as texts, not escaped."""

    titles: list[str]
    rows: list[list[str]]


def _listed(frame: pd.DataFrame, columns: Sequence[str]) -> Listed:
    """Those columns of the frame; a null is a dash."""
    titles = [TITLES.get(name, name.replace("_", " ")) for name in columns]
    return Listed(
        titles, [[_text(value) for value in row] for row in frame[list(columns)].itertuples(index=False)]
    )


def _text(value: Any) -> str:
    return units.MISSING if pd.isna(value) or value == "" else shortened(str(value))


def failures(frame: pd.DataFrame) -> Listed:
    """Every record that is not ok, with its reason; replicates that say the same share a row."""
    rows = tables.failed(frame).rename(columns={"replicate": "replicates"})
    apart = varying(frame, SETTING)
    if any(frame[key].nunique() > 1 for key in TRAINING):
        rows["training"] = [tables.trained(row) for _, row in rows.iterrows()]
        apart = [*apart, "training"]
    return _listed(rows, ["label", "seq_len", "depth", *apart, "replicates", "status", "reason"])


def contaminated(frame: pd.DataFrame) -> Listed:
    """Every finished record whose samples something else disturbed, with what it was."""
    rows = noise_tables.disturbed(frame).sort_values([*GROUP, "label", "seq_len", "replicate"])
    rows = rows.assign(because=rows["contaminated"])
    apart = [key for key in varying(frame, GROUP) if key != "depth"]
    return _listed(rows, ["label", "seq_len", "depth", *apart, "replicate", "because"])


def fits(cells: pd.DataFrame) -> Listed:
    """What is predicted to fit into a memory budget; takes `budgets.fits_cells`."""
    if cells.empty:
        return Listed([], [])
    rows = cells.assign(
        budget=[units.size(value, short=True) for value in cells["budget_bytes"]],
        longest=[budget_tables.longest(row) for _, row in cells.iterrows()],
        largest=[budget_tables.largest(row) for _, row in cells.iterrows()],
    )
    rows = rows.rename(columns={"longest": "longest sequence", "largest": "largest batch"})
    apart = [key for key in varying(cells, FIT) if key not in ("budget_bytes", "seq_len", "batch_size")]
    names = ["label", "activations", "depth", *apart, "budget"]
    return _listed(rows, [*names, "batch_size", "longest sequence", "seq_len", "largest batch"])


def payoff(cells: pd.DataFrame) -> Listed:
    """What training at the largest batch that fits yields; takes `budgets.payoff_cells`."""
    if cells.empty:
        return Listed([], [])
    rows = [row for _, row in cells.iterrows()]
    shown = pd.DataFrame(
        {
            **{TITLES.get(key, key): cells[key] for key in ("label", "activations", "seq_len", "depth")},
            **{key: cells[key] for key in varying(cells, PAYOFF) if key not in ("budget_bytes", "seq_len")},
            "budget": [units.size(value, short=True) for value in cells["budget_bytes"]],
            "largest batch": [budget_tables.largest(row) for row in rows],
            "throughput": [timed(row, "tokens_per_second", units.rate) for row in rows],
            "95 % interval": interval(rows, "tokens_per_second", "rate"),
            "/ keep": [units.ratio(value) for value in cells["gain"]],
            "replicates": cells["replicates"],
            "status": cells["status"],
        }
    )
    return _listed(shown, list(shown.columns))


def environments(frame: pd.DataFrame) -> Listed:
    """One row a machine and set of versions: on what the records were taken."""
    keys = ["machine", "cpu_model", "threads", "device", "gpu_driver"]
    keys += ["torch_version", "python_version", "allocator", "git_commit", "git_dirty"]
    known = frame.assign(git_commit=frame["git_commit"].str[:12])
    known["git_dirty"] = known["git_dirty"].map({True: "yes", False: "no"})
    known["day"] = known["started_at"].astype("string").str[:10]
    grouped = known.groupby(keys, dropna=False, sort=True)
    rows = grouped.agg(first_day=("day", "min"), last_day=("day", "max"), records=("day", "size"))
    rows = rows.reset_index().dropna(axis="columns", how="all")
    names = {"torch_version": "torch", "python_version": "python", "git_commit": "commit"}
    rows = rows.rename(columns={**names, "cpu_model": "CPU", "git_dirty": "uncommitted changes"})
    return _listed(rows, list(rows.columns))
