"""The timed measurements of cells, with their twins, and the ratios of their times to the baseline."""

from __future__ import annotations

import numpy as np
import pandas as pd

from bench.report.data.compared_time import RATE, SECONDS
from bench.report.data.disturbed import DISTURBED, RATIO_DISTURBED, flags, marked, one_a_round
from bench.report.data.groups import CELL, GROUP, NUMBER, numbered
from bench.report.data.intervals import by_cell
from bench.report.data.ratios import MEASURED, ratios_to
from bench.report.data.sampling import ended_short

TIMES = {
    "step_seconds_median": "step_seconds",
    "forward_seconds_median": "forward_seconds",
    "tokens_per_second": "tokens_per_second",
    "device_seconds_step": "device_seconds",
    SECONDS: SECONDS,
    RATE: RATE,
    "forward_tokens_per_second": "forward_tokens_per_second",
}
"""Figures that a disturbance changes → their names in tables."""
PAIRED = {
    "step_seconds_median": "step_seconds",
    "forward_seconds_median": "forward_seconds",
    "tokens_per_second": "tokens_per_second",
    SECONDS: SECONDS,
    RATE: RATE,
}
"""Figures whose ratio to dense is taken within each replicate: a slow round slows both."""


def timings(frame: pd.DataFrame, every: pd.DataFrame | None) -> pd.DataFrame:
    """The timed, finished records of the frame and the twins of its cells. The frame has the `NUMBER` of each
    row's cell, and so have the twins."""
    rows = frame
    if every is not None and (every["twin"] != 0).any():
        twins = every[every["twin"] != 0]
        cells = frame.drop_duplicates(NUMBER)[[*CELL, NUMBER]]
        rows = pd.concat([frame, twins.merge(cells, on=list(CELL))], ignore_index=True)
    rows = rows[(rows["status"] == "ok") & rows[list(TIMES)].notna().any(axis=1)]
    return marked(rows).assign(sampled_short=ended_short(rows))


def paired(cells: pd.DataFrame, timed: pd.DataFrame) -> pd.DataFrame:
    """Add `rounds` and, for the figures of `PAIRED`, the ratio to the baseline's measurements nearest in
    time: its median over the rounds and its interval. The baseline itself has the ratio 1 and no interval.
    The cells are by number."""
    itself_cells = cells["label"] == cells["baseline"]
    places = pd.DataFrame({"place": numbered(cells, [*GROUP, "seq_len"]), "is_baseline": itself_cells})
    keys = [NUMBER, "replicate", "twin", DISTURBED, "started_at"]
    each = timed[[*keys, *PAIRED]].join(places, on=NUMBER)
    itself, others = each[each["is_baseline"]], each[~each["is_baseline"]]
    ratios = ratios_to(others, itself, ["place", "replicate"], list(PAIRED))
    # NaN stays: a figure that was not taken has no ratio
    ones = itself.assign(**{name: itself[name] / itself[name] for name in PAIRED}, **{DISTURBED: False})
    own = one_a_round(pd.concat([ratios, ones]) if len(ratios) else ones, [NUMBER])
    rounds = own.groupby([NUMBER, "replicate"], sort=False)[list(PAIRED)].median()
    cells = cells.copy()
    for source, name in PAIRED.items():
        intervals = by_cell(rounds[source], [NUMBER])
        cells[f"{name}_ratio"] = rounds[source].groupby(level=NUMBER, sort=False).median()
        for end in ("low", "high"):
            cells[f"{name}_ratio_{end}"] = intervals[end].where(~itself_cells)
        if name == SECONDS:
            cells["rounds"] = intervals["count"]
    cells["rounds"] = cells["rounds"].fillna(0).astype(int)
    cells[RATIO_DISTURBED] = flags(own, [NUMBER]).reindex(cells.index).eq(True)
    cells[MEASURED] = own.groupby(NUMBER)[MEASURED].min() if MEASURED in own else np.nan
    return cells
