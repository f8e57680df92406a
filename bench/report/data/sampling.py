"""How precisely the steps of a cell were sampled within its process."""

from __future__ import annotations

import pandas as pd

HALF_WIDTH = "step_precision"
"""Key of records: half-width of the 95 % interval of the median step, as a share of it."""


def ended_short(rows: pd.DataFrame) -> pd.Series[bool]:
    """Whether sampling ended on its budget, before the interval was as narrow as `measure.precision`."""
    return rows["sampling_end"].eq("budget")
