"""Utilisation: the share of the machine's best matrix-product rate that a training step reaches.

The peak is the highest that any record of the same machine, threads and type of numbers has, so that all of
them are compared with the same rate.
"""

from __future__ import annotations

import pandas as pd

MACHINE = ("device", "machine", "threads", "dtype")


def peaks(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a machine, its threads and type of numbers: the highest `peak_flops_per_second` and
    `peak_bytes_per_second` found. Empty where no record has any."""
    known = frame[frame["peak_flops_per_second"].notna()]
    rates = ["peak_flops_per_second", "peak_bytes_per_second"]
    return known.groupby(list(MACHINE))[rates].max().reset_index()


def utilisation_cells(cells: pd.DataFrame, known: pd.DataFrame) -> pd.DataFrame:
    """The cost cells that were timed on a machine whose peak is known; takes `peaks` as `known`.

    New columns, shares of the peak: `utilisation` (algorithmic FLOPs over the median step) and, over the ends
    of the step time's interval, `utilisation_low` to `utilisation_high`.
    """
    timed = cells.merge(known, on=list(MACHINE))
    ends = {"": "median", "_low": "high", "_high": "low"}
    rates = {
        f"utilisation{end}": timed["flops_algorithmic_step"] / timed[f"step_seconds_{time}"]
        for end, time in ends.items()
    }
    shares = {name: rate / timed["peak_flops_per_second"] for name, rate in rates.items()}
    timed = timed.assign(**shares)
    return timed[timed["utilisation"].notna()]
