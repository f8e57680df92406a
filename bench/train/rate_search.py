"""Search for a learning rate: a few rates, and more beyond an end if the best rate is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_FURTHER = 2
"""Maximum number of rates that are tried beyond those that were given."""


@dataclass(frozen=True)
class RateSearch:
    """The rates that were tried, ascending, with the nll of each; infinite if training diverged."""

    nlls: dict[float, float]

    @property
    def best(self) -> float:
        """The rate with the smallest nll, the smaller of two with the same."""
        return min(self.nlls, key=lambda rate: (self.nlls[rate], rate))


def search(rates: Sequence[float], nll_of: Callable[[float], float]) -> RateSearch:
    """Try the rates, which are ascending, and return the results.

    While the best rate is the lowest or the highest, one more rate is tried beyond it, up to `MAX_FURTHER`.
    Its ratio to the best rate is that between the best rate and its neighbour. A rate that diverged, which
    has an infinite nll, is not the best unless all are.
    """
    found = {rate: nll_of(rate) for rate in rates}
    for _ in range(MAX_FURTHER):
        tried = RateSearch(dict(sorted(found.items())))
        order = list(tried.nlls)
        if tried.best not in (order[0], order[-1]):
            break
        neighbour = order[1] if tried.best == order[0] else order[-2]
        further = _rounded(tried.best * tried.best / neighbour)
        found[further] = nll_of(further)
    return RateSearch(dict(sorted(found.items())))


def _rounded(rate: float) -> float:
    """Round to two significant digits: 1e-2 · 1e-2 / 3e-3 is 3.3e-2."""
    return round(rate, 1 - math.floor(math.log10(rate)))
