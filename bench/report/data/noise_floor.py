"""The noise floor of a machine, from cells that were measured more than once in a replicate.

An A/A pair is two twins of one cell and replicate: the same work in two processes of one round. A difference
between them is noise; so is a difference between two variants that is no larger. The floor is the |log ratio|
that a new pair exceeds in 5 % of cases. It is an estimate from few pairs, so comparisons use its upper
confidence bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from bench.report.data.compared_time import SECONDS
from bench.report.data.different import NORMAL
from bench.report.data.disturbed import DISTURBED, marked
from bench.report.data.groups import CELL, SETTING, TRAINING, numbered
from bench.report.data.intervals import LEVEL, Floats

FIGURE = SECONDS
SAME = [*CELL, *TRAINING, "measure", "code_sha256"]
"""Keys that the twins of a pair share, besides their replicate."""
ROUND = [*SETTING, "measure", "replicate"]
"""Keys of the cells that ran in one round of a sweep."""
ENOUGH = 60
"""Pairs from which on the largest of them bounds their 95th percentile with a confidence of 95 %: that all
are below it has the probability 0.95⁵⁹ = 4.8 %."""
CONFIDENCE = 0.95
TAILS = 6.0
"""Least kurtosis of the errors that is assumed. Times of processes have longer tails than a normal
distribution, whose kurtosis is 3, and few residuals underestimate theirs. With 3, the bound of the floor
covers it in 81 to 95 % of simulated sets of 6 to 150 pairs, whose noise is normal or has Student's t
distribution of 3 to 5 degrees of freedom; with 6, in 91 to 99.9 % (of 4 or more, in 94 % at least)."""


@dataclass(frozen=True)
class Floor:
    """A noise floor: `estimate` and its upper confidence bound `upper`, both |log ratio|, and their source.

    `method` is 'percentile' (of the pairs) or 'model' (see `from_model`); NaN, and an empty method, without
    pairs.
    """

    estimate: float
    upper: float
    pairs: int
    method: Literal["percentile", "model", ""]


UNKNOWN_FLOOR = Floor(float("nan"), float("nan"), 0, "")


def measurements(every: pd.DataFrame) -> pd.DataFrame:
    """One row a finished measurement: the keys of `SAME`, `replicate`, `twin`, the compared time (of several
    records their median), `started_at` and `DISTURBED`. `cell`, `block` and `round` number the rows that
    share `SAME`, `SETTING` and `ROUND`. `every` has the records of all twins.
    """
    timed = marked(every[(every["status"] == "ok") & (every[FIGURE] > 0)])
    keys = [*SAME, "replicate", "twin"]
    number = numbered(timed, keys)
    groups = timed.groupby(number, sort=False)
    # a text: where all are null it would be a number, which does not sort among texts
    starts = timed["started_at"].astype(object).where(timed["started_at"].notna(), "")
    rows = timed.loc[~number.duplicated(), keys].reset_index(drop=True)
    return rows.assign(
        **{FIGURE: groups[FIGURE].median(), DISTURBED: groups[DISTURBED].any()},
        started_at=starts.groupby(number, sort=False).min(),
        cell=numbered(rows, SAME),
        block=numbered(rows, SETTING),
        round=numbered(rows, ROUND),
    )


def pairs(measured: pd.DataFrame) -> pd.DataFrame:
    """One row an A/A pair: the keys of `SAME`, their number `cell`, `replicate`, `log_ratio`, `contaminated`.

    The measurements of a cell in one replicate are paired in the order in which they started, first and
    second, third and fourth, so that pairs share none. The ratio is the later's compared time over the
    earlier's. Disturbed measurements are left out; those of a cell and replicate without an undisturbed pair
    are paired all the same, and are `contaminated`. Takes `measurements`.
    """
    own = ["cell", "replicate"]
    keys = [measured[key] for key in own]
    sound = (~measured[DISTURBED]).groupby(keys, sort=False).transform("sum") >= 2
    rounds = measured[~measured[DISTURBED] | ~sound].sort_values(["started_at", "twin"], kind="stable")
    place = rounds.groupby(own, sort=False).cumcount()
    rounds = rounds.assign(pair=place // 2, later=place % 2)
    first, second = (rounds[rounds["later"] == later] for later in (0, 1))
    both = first.merge(second, on=[*own, "pair"], suffixes=("", "_again"))
    return both[[*SAME, *own]].assign(
        log_ratio=np.log(both[f"{FIGURE}_again"] / both[FIGURE]),
        contaminated=both[DISTURBED] | both[f"{DISTURBED}_again"],
    )


class Residuals(NamedTuple):
    """Sums over the residuals of a fit: their number, degrees of freedom, and sums of powers."""

    number: float
    freedom: float
    squares: float
    fourths: float


def residuals(cells: npt.NDArray[np.intp], rounds: npt.NDArray[np.intp], logs: Floats) -> Residuals:
    """Fit log t = round + cell + error by least squares; cells and rounds are numbers from 0 on.

    The cells' effects are removed by subtracting means, after which the rounds' are fitted (Frisch and Waugh,
    Econometrica 1, 1933): there are far more cells than rounds.
    """
    counts = np.bincount(cells)

    def centred(values: Floats) -> Floats:
        return values - (np.bincount(cells, values) / np.maximum(counts, 1))[cells]

    used = np.count_nonzero(counts)
    design = np.column_stack([centred((rounds == one).astype(float)) for one in np.unique(rounds)])
    target = centred(logs)
    effects, _, rank, _ = np.linalg.lstsq(design, target, rcond=1e-9)
    rest = target - design @ effects
    return Residuals(
        len(logs), float(len(logs) - used - rank), float(np.sum(rest**2)), float(np.sum(rest**4))
    )


def from_pairs(log_ratios: Floats) -> Floor:
    """The 95th percentile of `ENOUGH` pairs or more, which holds for any distribution.

    The estimate is at Weibull's position. The bound is the least of the ordered pairs above which the
    percentile lies with a probability of 5 % at most (Conover, Practical Nonparametric Statistics, 3.2).
    """
    sizes = np.sort(np.abs(log_ratios))
    if sizes.size < ENOUGH:
        raise ValueError(f"{sizes.size} pairs; {ENOUGH} or more are allowed")
    rank = int(stats.binom.ppf(CONFIDENCE, sizes.size, LEVEL)) + 1
    estimate = float(np.quantile(sizes, LEVEL, method="weibull"))
    return Floor(estimate, float(sizes[rank - 1]), sizes.size, "percentile")


def from_model(count: int, fits: list[Residuals]) -> Floor:
    """The floor from the residuals of the additive model, pooled over fits; for `count` pairs, too few for a
    percentile of their own.

    A ratio of two measurements has √2 times the deviation of one; that the errors are normal gives the
    percentile. The bound is that of a variance by χ², with 2 / (κ − 1) of the degrees of freedom, where κ is
    the kurtosis of the residuals (Box, Biometrika 40, 1953), but at least `TAILS`.
    """
    total = Residuals(*(float(sum(values)) for values in zip(*fits, strict=True)))
    if total.freedom < 1:
        return UNKNOWN_FLOOR
    deviation = np.sqrt(total.squares / total.freedom)
    kurtosis = total.number * total.fourths / total.squares**2 if total.squares else TAILS
    freedom = max(1.0, total.freedom * 2 / (max(kurtosis, TAILS) - 1))
    widening = np.sqrt(freedom / stats.chi2.ppf(1 - CONFIDENCE, freedom))
    estimate = float(NORMAL * np.sqrt(2) * deviation)
    return Floor(estimate, float(estimate * widening), count, "model")


class Noise:
    """The noise of one machine: its floor, and the floor without one of its cells.

    It takes the machine's A/A pairs, as `pairs` returns them, and its `measurements`. `all_pairs` are these
    pairs and `pairs` those that the floor rests on: the undisturbed ones, or all if there are none.
    """

    def __init__(self, twins: pd.DataFrame, measured: pd.DataFrame) -> None:
        self.all_pairs = twins
        sound = twins[~twins["contaminated"]]
        self.pairs = sound if len(sound) else twins
        self._fits: dict[int, Residuals] = {}
        self._measured = measured
        self._rows = pd.DataFrame()
        if 0 < len(self.pairs) < ENOUGH:
            rows = measured[~measured[DISTURBED]] if len(sound) else measured
            self._rows = rows.assign(log=np.log(rows[FIGURE]))
            self._fits = {int(str(name)): _fit(block) for name, block in self._rows.groupby("block")}

    @property
    def floor(self) -> Floor:
        """The floor from all of them."""
        return self._of(self.pairs, self._fits)

    def at(self, seq_len: int) -> Noise:
        """The noise of the cells of one length alone."""
        return Noise(
            self.all_pairs[self.all_pairs["seq_len"] == seq_len],
            self._measured[self._measured["seq_len"] == seq_len],
        )

    def without(self, own: pd.DataFrame) -> Floor:
        """The floor of the other cells than that of these pairs, which share the keys of `SAME`."""
        others = self.pairs.drop(own.index, errors="ignore")
        if self._rows.empty:
            return self._of(others, {})
        same = self._rows["cell"] == own["cell"].iloc[0]
        if not same.any():
            return self._of(others, self._fits)
        block = int(self._rows["block"][same].iloc[0])
        rest = self._rows[(self._rows["block"] == block) & ~same]
        return self._of(others, self._fits | {block: _fit(rest)})

    def _of(self, twins: pd.DataFrame, fits: dict[int, Residuals]) -> Floor:
        logs = twins["log_ratio"].to_numpy(dtype=float)
        if len(logs) >= ENOUGH:
            return from_pairs(logs)
        return from_model(len(logs), list(fits.values())) if len(logs) and fits else UNKNOWN_FLOOR


def _fit(block: pd.DataFrame) -> Residuals:
    if block.empty:
        return Residuals(0, 0, 0, 0)
    return residuals(
        pd.factorize(block["cell"])[0], pd.factorize(block["round"])[0], block["log"].to_numpy(dtype=float)
    )


def noises(every: pd.DataFrame) -> dict[str, Noise]:
    """Machine → its noise; takes the records of all twins."""
    measured = measurements(every)
    twins = pairs(measured)
    return {
        str(name): Noise(twins[twins["machine"] == name], measured[measured["machine"] == name])
        for name in sorted(every["machine"].unique())
    }


def floors(noises: Mapping[str, Noise]) -> dict[str, float]:
    """Machine → the upper bound of its noise floor, a |log ratio|, where it is known."""
    found = {name: noise.floor for name, noise in noises.items()}
    return {name: floor.upper for name, floor in found.items() if floor.method}
