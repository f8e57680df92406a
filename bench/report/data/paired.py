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

The interval of one difference has to hold for its own pair, which may be the one that varies most: where the
pair's own variance is kept, so are its own degrees of freedom. The p values of a family keep those of the
pool; with the few of a pair no difference would survive a correction. A difference is certain if its
corrected p value is small and its own interval excludes 0.

Chosen by simulation, with 64 blocks whose doubt is 0.3 times that of the replicates: how often, in per cent
of 400 pools of n equal variants, any pair is certainly different after Holm's correction, how often a
difference of 5 standard deviations between replicates is found, and, of 1,200 pools, how often the interval
of a pair covers 0. *uneven*: the replicates of one variant, which is in this pair, vary as many times as much
as the others'. *pool's*: with the pool's degrees of freedom in the interval too, as before.

| n | replicates | uneven | any different | found | covers | pool's |
|---|---|---|---|---|---|---|
| 3 | 2 | 1 | 3.2 | 26 | 96.5 | 95.7 |
| 3 | 2 | 3 | 6.8 | 17 | 94.5 | 92.2 |
| 3 | 2 | 5 | 7.0 | 16 | 92.8 | 89.3 |
| 3 | 3 | 1 | 4.5 | 82 | 95.4 | 94.6 |
| 3 | 3 | 3 | 4.5 | 58 | 94.8 | 92.3 |
| 3 | 3 | 5 | 5.8 | 45 | 95.1 | 91.9 |
| 12 | 3 | 1 | 0.8 | 62 | 95.8 | 95.5 |
| 12 | 3 | 3 | 2.8 | 46 | 94.2 | 89.4 |
| 12 | 3 | 5 | 4.8 | 29 | 95.3 | 88.7 |
| 12 | 5 | 1 | 1.0 | 98 | 96.8 | 96.3 |
| 12 | 5 | 3 | 4.0 | 96 | 95.3 | 90.9 |
| 12 | 5 | 5 | 2.5 | 88 | 95.2 | 91.6 |

With its own degrees of freedom in the p values too, 54 instead of 98 are found of 12 variants with 5
replicates. In an earlier simulation of 12 variants with 3 replicates, own variances alone found 4 per cent,
and without the two deviations 11.5 per cent of the uneven pools had a false difference.
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

    def drawn(self, variances: Floats, freedom: Floats) -> tuple[Floats, Floats, Floats]:
        """The variances (P,) drawn to this one, and their degrees of freedom in a family of pairs and each
        alone; NaN and 0 where a pair has no variance of its own."""
        weight = np.minimum(self.freedom, MOST_WEIGHT * freedom)
        together = np.where(freedom > 0, freedom + weight, np.nan)
        mixed = (weight * self.variance + freedom * variances) / together
        limit = np.maximum(freedom, self.most)
        of_pool = np.nan_to_num(np.minimum(together, limit))
        return np.maximum(variances, mixed), of_pool, np.where(variances > mixed, freedom, of_pool)


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
        variance, freedom, alone = prior.drawn(self.between, self.freedom)
        of_replicates = variance / np.maximum(self.replicates, 1)
        of_text = np.nan_to_num(self.of_text)
        return Judged(self.mean, of_replicates, freedom, alone, of_text, self.text_freedom)


@dataclass(frozen=True)
class Judged:
    """Differences (P,) with both squared standard errors and their degrees of freedom: over replicates those
    in a family and `alone`. Over replicates they are NaN and 0 where fewer than two decide nothing."""

    mean: Floats
    of_replicates: Floats
    freedom: Floats
    alone: Floats
    of_text: Floats
    text_freedom: int

    def margin(self, level: npt.ArrayLike, freedom: Floats) -> Floats:
        """Half the width of the intervals of this level, with these degrees of freedom over replicates; NaN
        where nothing is decided."""
        tail = (1 + np.asarray(level, dtype=float)) / 2
        over_replicates = special.stdtrit(np.where(freedom > 0, freedom, np.nan), tail)
        over_text = special.stdtrit(max(self.text_freedom, 1), tail)
        total = over_replicates**2 * self.of_replicates + over_text**2 * self.of_text
        return np.asarray(np.sqrt(total), dtype=np.float64)

    @property
    def p(self) -> Floats:
        """Two-sided p values of no difference, of a family; 1 where nothing is decided."""
        return self._p(self.freedom)

    def corrected(self, family: npt.NDArray[np.bool_]) -> Floats:
        """The p values of those pairs, corrected for their number; none below what the pair's own interval
        says, so that no difference whose interval has 0 in it is certain."""
        return np.maximum(holm(self.p[family]), self._p(self.alone)[family])

    def _p(self, freedom: Floats) -> Floats:
        """Where the interval of level 1 − p ends at 0; by halving the interval of the logarithm, from
        `SMALLEST` to 1."""
        low, high = np.full(len(self.mean), math.log(SMALLEST)), np.zeros(len(self.mean))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            differs = np.abs(self.mean) > self.margin(-np.expm1(middle), freedom)
            low, high = np.where(differs, low, middle), np.where(differs, middle, high)
        return np.exp(high)

    @property
    def interval(self) -> tuple[Floats, Floats]:
        """Both ends of the interval of `LEVEL` of each difference alone; NaN where nothing is decided."""
        margin = self.margin(LEVEL, self.alone)
        return self.mean - margin, self.mean + margin


def holm(p: Floats) -> Floats:
    """p values corrected for their number, so that with probability 1 − α no true hypothesis is below α
    (Holm 1979, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6(2))."""
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(steps, 1.0)
    return corrected
