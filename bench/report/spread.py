"""How far a figure over replicates may be off: a bootstrap interval over them, by scipy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000


def interval(
    values: npt.ArrayLike, statistic: Callable[..., Any] = np.median, *, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over replicates; NaN for fewer than two.

    The draws are the same each time. Of five replicates or fewer the interval of a median is their range.
    """
    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if len(sample) < 2:
        return np.nan, np.nan
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    found = stats.bootstrap(
        (sample,),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
