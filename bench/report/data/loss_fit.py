"""A loss curve over training budgets: L = E + A · D^−α, fitted without the largest budget and asked for it.

E is the loss that is left with any amount of training, A the loss that training removes and α how fast
(Hoffmann 2022, arXiv:2203.15556, §3.3, for a fixed model size). D is in tokens. For each α the best E and A
are a linear problem, so that only α is searched (variable projection: Golub & Pereyra 1973, SIAM J. Numer.
Anal. 10(2)). None of the three is negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize

from bench.report.data.intervals import Floats

FEWEST = 4
"""Budgets of a fit. The form has three parameters, so that it goes through any three points; with four, three
are fitted and only the prediction of the fourth tests the form. With fewer nothing does."""
SLOWEST, FASTEST = 0.01, 4.0
"""The α that are searched. At the lower end the curve is a logarithm; at the upper end one doubling leaves a
sixteenth of what can be removed."""


@dataclass(frozen=True)
class LossFit:
    """The parameters, and the loss at the largest budget as it is predicted by the others."""

    floor: float
    """E."""
    scale: float
    """A · (smallest budget)^−α: how far the loss at the smallest budget is above E."""
    exponent: float
    """α."""
    predicted: float

    @property
    def at_bound(self) -> bool:
        """Whether α ends at a bound of the search or E at 0: the points do not bend as the form does."""
        return not SLOWEST * 1.01 < self.exponent < FASTEST * 0.99 or self.floor == 0


def fit(budgets: Sequence[float], losses: Sequence[float]) -> LossFit | None:
    """Fit all points but the last; budgets are ascending. None for fewer than `FEWEST`, and if a loss is not
    a finite number."""
    size, loss = np.asarray(budgets, dtype=float), np.asarray(losses, dtype=float)
    if len(size) < FEWEST or not np.isfinite(loss).all():
        return None
    grown = size / size[0]

    def solved(exponent: float) -> tuple[Floats, float]:
        return _solved(grown[:-1] ** -exponent, loss[:-1])

    def error(logarithm: float) -> float:
        return solved(math.exp(logarithm))[1]

    grid = np.linspace(math.log(SLOWEST), math.log(FASTEST), 60)
    best = int(np.argmin([error(place) for place in grid]))
    around = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = optimize.minimize_scalar(error, bounds=around, method="bounded", options={"xatol": 1e-10})
    exponent = math.exp(float(found.x))
    (floor, scale), _ = solved(exponent)
    return LossFit(float(floor), float(scale), exponent, float(floor + scale * grown[-1] ** -exponent))


def _solved(falling: Floats, loss: Floats) -> tuple[Floats, float]:
    """E and A, neither negative, and the length of the residual."""
    parameters, residual = optimize.nnls(np.column_stack([np.ones_like(falling), falling]), loss)
    return parameters, float(residual)
