"""Utilisation: what share of the machine's best matrix-product rate a training step reaches.

A machine can do what it was ever seen to do: the peak is the highest that any record of the same machine,
threads and type of numbers has, so that all of them are held against the same.
"""

from __future__ import annotations

import pandas as pd

from bench.report.groups import CELL, split
from bench.report.spread import interval

MACHINE = ("device", "machine", "threads", "dtype")


def peaks(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a machine, its threads and type of numbers: the highest `peak_flops_per_second` and
    `peak_bytes_per_second` found. Empty where no record has any."""
    known = frame[frame["peak_flops_per_second"].notna()]
    rates = ["peak_flops_per_second", "peak_bytes_per_second"]
    return known.groupby(list(MACHINE))[rates].max().reset_index()


def utilisation_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a finished cell of a machine whose peak is known: the keys and, as shares of the peak,
    `utilisation` (algorithmic FLOPs over the step's time; the median over replicates) with its 95 % interval
    `utilisation_low` to `utilisation_high`, and `replicates`."""
    timed = frame[(frame["status"] == "ok") & frame["step_seconds_median"].notna()]
    timed = timed.merge(peaks(frame), on=list(MACHINE), suffixes=("_own", ""))
    rate = timed["flops_algorithmic_step"] / timed["step_seconds_median"]
    timed = timed.assign(utilisation=rate / timed["peak_flops_per_second"])
    timed = timed[timed["utilisation"].notna()]
    rows = []
    for values, own in split(timed, CELL):
        low, high = interval(own["utilisation"])
        rows.append(
            {
                **values,
                "utilisation": own["utilisation"].median(),
                "utilisation_low": low,
                "utilisation_high": high,
                "replicates": own["replicate"].nunique(),
            }
        )
    return pd.DataFrame(rows)
