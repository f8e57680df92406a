"""Cells that search for the sizes that fit into a memory budget, aggregated over replicates."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.report.data.compared_time import RATE
from bench.report.data.disturbed import (
    DISTURBED,
    RATIO_DISTURBED,
    marked,
    takes_part,
    undisturbed_medians,
    with_ratios,
)
from bench.report.data.groups import FIT, PAYOFF
from bench.report.data.intervals import by_cell
from bench.report.data.kinds import KEEP
from bench.report.data.statistics import distinct, status_counts
from bench.report.figures.style import ordered

LONGEST, LARGEST = 2**22, 2**16
"""Tokens and sequences at which the search ends: a result at this end is a lower bound."""


def fits_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a depth, variant and strategy: `longest_seq_len`, `largest_batch_size`, `status`.

    Of several replicates the smallest result counts: it must fit for all of them.
    """
    keys = [*FIT, "depth", "variant", "label", "activations"]
    groups = frame.groupby(keys, sort=False, dropna=False)
    cells = groups[["longest_seq_len", "largest_batch_size"]].min()
    cells["status"] = groups["status"].agg(status_counts)
    return ordered(cells.reset_index())


def payoff_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per depth, variant and strategy: the largest batch that fits, and its training throughput.

    Columns: the keys, `largest_batch_size`, `tokens_per_second` (of `compared_time`) with its interval as
    `_low` and `_high`, `gain` (median over replicates of the throughput over that of `keep` in the same
    replicate), `peak_bytes`, `peak_bytes_source`, `replicates`, `status`; `disturbed` and `ratio_disturbed`,
    whether the throughput and the gain are of disturbed measurements, which take part where a row has no
    others.
    """
    keys = [*PAYOFF, "depth", "variant", "label", "activations"]
    ok = frame["status"] == "ok"
    figures = ["tokens_per_second", "peak_bytes"]
    frame = frame.assign(tokens_per_second=frame[RATE])
    frame = frame.assign(**{name: frame[name].where(ok) for name in figures})
    peers = [key for key in (*keys, "replicate") if key != "activations"]
    frame = marked(frame)
    gains = {"tokens_per_second": "gain"}
    frame = with_ratios(frame, frame[frame["activations"] == KEEP], peers, gains)
    groups = frame.groupby(keys, sort=False, dropna=False)
    rates = undisturbed_medians(frame, keys, gains, timed=list(gains))
    timed = frame[frame["tokens_per_second"].notna()]
    ends = by_cell(timed[takes_part(timed, keys)].set_index(keys)["tokens_per_second"], keys)
    columns: dict[str, pd.Series[Any]] = {
        "largest_batch_size": groups["largest_batch_size"].min(),
        "tokens_per_second": rates["tokens_per_second"],
        "tokens_per_second_low": ends["low"],
        "tokens_per_second_high": ends["high"],
        "gain": rates["gain"],
        DISTURBED: rates[DISTURBED],
        RATIO_DISTURBED: rates[RATIO_DISTURBED],
        "peak_bytes": groups["peak_bytes"].median(),
        "peak_bytes_source": groups["peak_bytes_source"].agg(distinct),
        "replicates": frame["replicate"].where(ok).groupby([frame[k] for k in keys]).nunique(),
        "status": groups["status"].agg(status_counts),
    }
    return ordered(pd.DataFrame(columns).reset_index())
