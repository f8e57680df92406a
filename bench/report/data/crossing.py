"""Ratios of cost against length, and the length at which they pass 1.

Between two measured lengths the logarithm of a ratio is taken as linear in the logarithm of the length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.report.data.compared_time import SECONDS

FIGURES = {"time": f"{SECONDS}_ratio", "memory": "peak_bytes_ratio", "flops": "flops_executed_ratio"}
"""Name of a comparison → its column of the cost cells; times also have an interval."""
SAME = 1e-3
"""Ratios nearer to 1 than this are 1: a window that holds the whole sequence is not cheaper by a handful of
bytes."""


def crossing(lengths: Sequence[float], ratios: Sequence[float]) -> tuple[str, float]:
    """Where ratios to dense, at ascending lengths, are below 1, and the length at which they last cross 1.

    ('from', T): cheaper from T tokens on; ('until', T): cheaper up to T only; ('always', the shortest
    length); ('never', the longest length).
    """
    logs = np.log(np.asarray(ratios, dtype=float))
    logs[np.abs(logs) < SAME] = 0.0
    cheaper = logs < 0
    if cheaper.all():
        return "always", float(lengths[0])
    if not cheaper.any():
        return "never", float(lengths[-1])
    last = int(np.flatnonzero(cheaper[1:] != cheaper[:-1])[-1])
    share = logs[last] / (logs[last] - logs[last + 1])
    places = np.log(np.asarray(lengths[last : last + 2], dtype=float))
    return ("from" if cheaper[-1] else "until"), float(np.exp(places[0] + share * (places[1] - places[0])))
