"""Ratios of times to a baseline that ran close to them.

The sweep measures the baseline several times in a replicate, as twins, between the other cells. A machine's
speed drifts, so each measurement is compared with the baseline's measurements nearest in time: the last that
started before it and the first that started after it. Their geometric mean stands for the baseline.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bench.report.data.disturbed import DISTURBED, takes_part

MEASURED = "baseline_measurements"
"""Column of ratios: how many measurements of the baseline each is relative to."""


def ratios_to(
    rows: pd.DataFrame, baseline: pd.DataFrame, where: Sequence[str], figures: Sequence[str]
) -> pd.DataFrame:
    """The rows that have a baseline, with the figures divided by it, `DISTURBED` and `MEASURED`.

    `rows` and `baseline` are measurements with `started_at`, `DISTURBED`, the figures and the columns
    `where`, which both share: a baseline is of the same replicate. Undisturbed measurements of the baseline
    come before disturbed ones, however far in time. Without times of start, all of them count. A ratio is
    disturbed if the row or the baseline is.
    """
    rows = rows.reset_index(drop=True)
    own = rows[list(where)].assign(row=rows.index, start=_start(rows))
    others = baseline[[*where, *figures, DISTURBED]].assign(its_start=_start(baseline))
    both = own.merge(others, on=list(where))
    both = both[takes_part(both, ["row"])]
    before = both["its_start"].where(both["its_start"] <= both["start"]).groupby(both["row"]).transform("max")
    after = both["its_start"].where(both["its_start"] > both["start"]).groupby(both["row"]).transform("min")
    unknown = before.isna() & after.isna()
    both = both[(both["its_start"] == before) | (both["its_start"] == after) | unknown]
    both[list(figures)] = np.log(both[list(figures)].where(both[list(figures)] > 0).astype(float))
    by_row = both.groupby("row")
    means = by_row[list(figures)].mean()
    compared = rows.loc[means.index].copy()
    compared[list(figures)] = compared[list(figures)] / np.exp(means)
    compared[DISTURBED] |= by_row[DISTURBED].any()
    compared[MEASURED] = by_row.size()
    return compared


def _start(rows: pd.DataFrame) -> pd.Series[float]:
    """Seconds since 1970; NaN where the record does not say when its cell started."""
    if "started_at" not in rows:
        return pd.Series(np.nan, index=rows.index)
    times = pd.to_datetime(rows["started_at"], utc=True, format="ISO8601", errors="coerce")
    # The unit of seconds: dates beyond the year 2262 have no number of nanoseconds.
    return (times - pd.Timestamp(0, unit="s", tz="UTC").as_unit("s")).dt.total_seconds()
