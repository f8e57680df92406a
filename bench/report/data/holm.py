"""Holm's correction of p-values for the number of comparisons in a family."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def holm(p_values: npt.ArrayLike) -> Floats:
    """The adjusted p-values, in the order given; NaN stays NaN and is not counted as a comparison.

    Calling those different that are ≤ α gives at most α as the probability of any false call in the family,
    however the comparisons depend on each other. Source: S. Holm, "A simple sequentially rejective multiple
    test procedure", Scandinavian Journal of Statistics 6 (1979). Raises ValueError for a value outside 0 to 1
    and for more than one dimension.
    """
    values = np.array(p_values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"p-values of shape {values.shape}; one dimension is allowed")
    known = np.flatnonzero(~np.isnan(values))
    outside = values[known][(values[known] < 0) | (values[known] > 1)]
    if outside.size:
        raise ValueError(f"p-value {outside[0]:g}; 0 to 1 is allowed")
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(order.size, 0, -1)
    values[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return values
