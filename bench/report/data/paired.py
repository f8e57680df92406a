"""Differences in loss between models that score the same targets, with their doubt over replicates and text.

Shapes: P pairs, S replicates, K blocks of text, U units of text.

Two models of one replicate see the same batches in training, and all models score the same targets. So a
difference is taken within each replicate and each block, and what the two share cancels. Its mean over both
has two sources of doubt: another replicate, and other text. A table of replicates × blocks is crossed, and
the squared standard error of its mean is at most

    (variance between replicates) / S + (variance between units of text) / U

where each variance is of means over the other axis. The sum counts the interaction twice, which is on the
safe side: it is the variance that the pigeonhole bootstrap resamples (Owen 2007, "The pigeonhole bootstrap",
Annals of Applied Statistics 1(2), §3–4). For a mean this needs no resampling: the bootstrap's standard error
has a closed form (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", §5.2), and resamples do not
reach the small levels that many comparisons need. Both margins are Student's t of their own degrees of
freedom, and the margin of the sum is the root of their squares (Zou & Donner 2008, Statistics in Medicine
27(10), §2). Satterthwaite's degrees of freedom of the sum were tried: with two replicates they called 12 % of
equal pairs different.

Three replicates alone do not tell a variance: with 2 degrees of freedom and 66 comparisons a difference would
have to be 36 standard errors. So each pair's variance between replicates is drawn to those of the other pairs
of its pool, the more, the less these differ (Smyth 2004, "Linear models and empirical Bayes methods",
Statistical Applications in Genetics and Molecular Biology 3(1), §3 and §6.2). Two deviations keep a variant
that varies more than the others from being called different too often: the others never count more than
`MOST_WEIGHT` times as much as the pair itself, and the drawn variance is never below the pair's own. One pair
alone keeps its own.

Chosen by simulation, with 64 blocks: how often, in per cent of 120 to 200 pools of n equal variants, any pair
is called different after Holm's correction, and how often, of 60 pools, a difference of 5 standard deviations
between replicates is found. *uneven*: the replicates of one variant vary five times as much.

| n | replicates | equal | uneven | found |
|---|---|---|---|---|
| 3 | 2 | 2.5 | 8.0 | 27 |
| 3 | 3 | 2.5 | 5.5 | 88 |
| 12 | 3 | 0.5 | 4.0 | 53 |
| 12 | 5 | 1.0 | 2.0 | 98 |
| 12 | 3, own variances only | 0.8 | 0.8 | 4 |
| 12 | 3, without the deviations | 2.0 | 11.5 | 84 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from bench.report.data.intervals import LEVEL, Floats

DOCUMENTS = 16
"""Documents from which on they are the units of text; of fewer, whose variance would not be known, the blocks
are, and the doubt is about more text of these documents."""
MOST_WEIGHT = 3
"""How many times its own degrees of freedom the other pairs count at most in a pair's variance."""
LEAST = 1e-5
"""A variance below this share of the median counts as this share, so that its logarithm is finite; as in
Smyth's program limma."""

SMALLEST = 1e-12
"""No p value is reported smaller."""
HALVINGS = 24
"""Of the interval in which the logarithm of a p value lies: it is known to within 2 ppm."""

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Text:
    """The units of text that losses by block are added up to."""

    weights: Floats
    """(K,) scored targets of each block."""
    unit: Ints
    """(K,) the unit of each block, from 0 on."""

    @classmethod
    def of(cls, targets: npt.ArrayLike, documents: npt.ArrayLike) -> Self:
        """Take the records' `block_targets` and `block_documents`, of which there is one for each block."""
        unit = np.unique(np.asarray(documents), return_inverse=True)[1]
        weights = np.asarray(targets, dtype=float)
        return cls(weights, unit if unit.max() + 1 >= DOCUMENTS else np.arange(len(weights)))

    def variance(self, differences: Floats) -> tuple[Floats, int]:
        """The squared standard error, over text, of the weighted means of differences (P, K), and its
        degrees of freedom; by linearising the mean as a ratio of sums, which bears units of any size."""
        middle = differences @ self.weights / self.weights.sum()
        count = int(self.unit.max()) + 1
        if count < 2:
            return np.full(len(differences), np.nan), 0
        sums = np.zeros((len(differences), count))
        np.add.at(sums.T, self.unit, ((differences - middle[:, None]) * self.weights).T)
        return count / (count - 1) * (sums**2).sum(axis=1) / self.weights.sum() ** 2, count - 1


@dataclass(frozen=True)
class Prior:
    """How the variances between replicates of a pool are distributed: `variance` with `freedom` degrees of
    freedom, infinite where all are alike, 0 where nothing is known. `most` bounds the degrees of freedom of a
    variance that is drawn to it: those of all losses of the pool."""

    variance: float
    freedom: float
    most: int

    @classmethod
    def of(cls, variances: Floats, freedom: Floats, most: int) -> Self:
        """Fit it to the variances of pairs by the moments of their logarithms (Smyth 2004, §6.2)."""
        known = freedom > 0
        own, d = variances[known], freedom[known]
        if len(own) < 3:
            return cls(0.0, 0.0, most)
        pooled = float(np.average(own, weights=d))
        least = LEAST * float(np.median(own))
        if not least:
            return cls(pooled, math.inf, most)
        logs = np.log(np.maximum(own, least)) - special.digamma(d / 2) + np.log(d / 2)
        excess = float(logs.var(ddof=1) - special.polygamma(1, d / 2).mean())
        if excess <= 0:
            return cls(pooled, math.inf, most)
        half = _inverse_trigamma(excess)
        return cls(float(np.exp(logs.mean() + special.digamma(half)) / half), 2 * half, most)

    def drawn(self, variances: Floats, freedom: Floats) -> tuple[Floats, Floats]:
        """The variances (P,) drawn to this one, and their degrees of freedom; NaN and 0 where a pair has no
        variance of its own."""
        weight = np.minimum(self.freedom, MOST_WEIGHT * freedom)
        together = np.where(freedom > 0, freedom + weight, np.nan)
        drawn = np.maximum(variances, (weight * self.variance + freedom * variances) / together)
        limit = np.maximum(freedom, self.most)
        return drawn, np.nan_to_num(np.minimum(together, limit))


def _inverse_trigamma(value: float) -> float:
    def excess(logarithm: float) -> float:
        return float(special.polygamma(1, math.exp(logarithm))) - value

    return math.exp(optimize.brentq(excess, math.log(1e-6), math.log(1e9)))


@dataclass(frozen=True)
class Sides:
    """Losses of P models, or of the first or second models of P pairs: `means` (P, S), NaN in a replicate
    that is not there, and `blocks` (P, S, K)."""

    means: Floats
    blocks: Floats

    def take(self, which: Ints) -> Sides:
        """Those of the models."""
        return Sides(self.means[which], self.blocks[which])


@dataclass(frozen=True)
class Differences:
    """The first minus the second of P pairs, in the unit of the losses; all (P,)."""

    mean: Floats
    """Over the replicates that both have; NaN if there is none."""
    replicates: Ints
    between: Floats
    """Variance between replicates; NaN for fewer than two."""
    of_text: Floats
    """Squared standard error over text; NaN if it is not known."""
    text_freedom: int

    @classmethod
    def of(cls, first: Sides, second: Sides, text: Text | None) -> Differences:
        """Without `text` nothing is known of the doubt over text."""
        apart = first.means - second.means
        there = ~np.isnan(apart)
        count = there.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(there, apart, 0).sum(axis=1) / np.where(count, count, np.nan)
            squares = np.where(there, (apart - mean[:, None]) ** 2, 0).sum(axis=1)
            between = squares / np.where(count > 1, count - 1, np.nan)
        if text is None:
            return cls(mean, count, between, np.full(len(mean), np.nan), 0)
        by_block = np.where(there[:, :, None], first.blocks - second.blocks, 0).sum(axis=1)
        by_block /= np.maximum(count, 1)[:, None]
        return cls(mean, count, between, *text.variance(by_block))

    @property
    def freedom(self) -> Floats:
        """Degrees of freedom of each variance between replicates."""
        return np.maximum(self.replicates - 1, 0).astype(float)

    def prior(self, most: int) -> Prior:
        """The prior of these pairs."""
        return Prior.of(self.between, self.freedom, most)

    def judged(self, prior: Prior) -> Judged:
        """Their doubt; where it is not known over text, that over replicates alone."""
        variance, freedom = prior.drawn(self.between, self.freedom)
        of_replicates = variance / np.maximum(self.replicates, 1)
        return Judged(self.mean, of_replicates, freedom, np.nan_to_num(self.of_text), self.text_freedom)


@dataclass(frozen=True)
class Judged:
    """Differences (P,) with both squared standard errors and their degrees of freedom. Those over replicates
    are NaN and 0 where fewer than two replicates decide nothing."""

    mean: Floats
    of_replicates: Floats
    freedom: Floats
    of_text: Floats
    text_freedom: int

    def margin(self, level: npt.ArrayLike) -> Floats:
        """Half the width of the intervals of this level; NaN where nothing is decided."""
        tail = (1 + np.asarray(level, dtype=float)) / 2
        over_replicates = special.stdtrit(np.where(self.freedom > 0, self.freedom, np.nan), tail)
        over_text = special.stdtrit(max(self.text_freedom, 1), tail)
        total = over_replicates**2 * self.of_replicates + over_text**2 * self.of_text
        return np.asarray(np.sqrt(total), dtype=np.float64)

    @property
    def p(self) -> Floats:
        """Two-sided p values of no difference, where the interval of level 1 − p ends at 0; 1 where nothing
        is decided. By halving the interval of the logarithm, from `SMALLEST` to 1."""
        low, high = np.full(len(self.mean), math.log(SMALLEST)), np.zeros(len(self.mean))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            differs = np.abs(self.mean) > self.margin(-np.expm1(middle))
            low, high = np.where(differs, low, middle), np.where(differs, middle, high)
        return np.exp(high)

    @property
    def interval(self) -> tuple[Floats, Floats]:
        """Both ends of the interval of `LEVEL` of each difference alone; NaN where nothing is decided."""
        margin = self.margin(LEVEL)
        return self.mean - margin, self.mean + margin


def holm(p: Floats) -> Floats:
    """p values corrected for their number, so that with probability 1 − α no true hypothesis is below α
    (Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6(2))."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected
