"""Ranks with their doubt: which models of a pool are certainly better than which, and whether to rank at all.

A pool are the cells that share data, size, length and training budget (`groups.BUDGET`). All pairs of its
models are compared, corrected by Holm for their number. A model's rank is an interval: from one more than the
models that are certainly better to the number of those that are not certainly worse. Models that nothing
tells apart are so one group of ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from bench.report.data.groups import BUDGET, SEARCH
from bench.report.data.intervals import LEVEL, Floats
from bench.report.data.orderings import SHOWN, Row, expected, verdict
from bench.report.data.paired import Ints, Prior
from bench.report.data.pool import Pool

MOST_COMPARISONS = 80
"""Comparisons of a family. Beyond them the corrected level is below 0.0006, where few replicates rely on a
normality that nobody can check; a larger pool is compared with dense alone."""
FULL = "dense"
"""The variant that larger pools are compared with, and that tables give the difference to."""
FALSE = 1 - LEVEL
"""The probability that a pool of equal models has any false difference, at most."""
OF_BOTH, OF_REPLICATES = "replicates and text", "replicates"


@dataclass(frozen=True)
class Ranking:
    """`cells` with the columns of `ranked`; `pairs`, one row a comparison; `orderings`, one row an ordering
    of a pool that its cells can show; the keys of `BUDGET` are in both."""

    cells: pd.DataFrame
    pairs: pd.DataFrame
    orderings: pd.DataFrame


def ranked(cells: pd.DataFrame, records: pd.DataFrame) -> Ranking:
    """Rank the cells of every pool.

    `cells` is a row a model with `leaks`, `undertrained`, `no_baseline`, `nll_mean`, `bits_per_byte_mean` and
    `perplexity_mean`, indexed from 0; the finished `records` have the `number` of their cell, its index. New
    columns: `rank_low` and `rank_high` (NaN for what is not ranked), `comparisons` of the family, `doubt`
    (what the intervals cover), `nll_to_dense` with `_low` and `_high` (nats per target, 95 %, each alone),
    `unsettled` (an ordering of its pool does not appear), `is_other_rate`, `number`, and `beats`: the numbers
    of the cells that this one is certainly better than. Of the learning rates of a model only the best takes
    part; the others are `is_other_rate`.
    """
    pool = cells.groupby(list(BUDGET), sort=False, dropna=False).ngroup()
    cells = cells.assign(number=cells.index, pool=pool, is_other_rate=~_best_rate(cells))
    scored = cells["perplexity_mean"].notna() | cells["bits_per_byte_mean"].notna()
    members = cells[scored & ~cells["leaks"].eq(True) & ~cells["is_other_rate"]]
    declared = _declared(members, records)
    in_pool = records["number"].map(pool)
    by_pool = {at: records.loc[rows] for at, rows in records.groupby(in_pool).groups.items()}
    results = [
        _judge(own, Pool.of(by_pool[number], list(own.index)), declared)
        for number, own in members.groupby("pool", sort=False)
    ]
    columns = [one.columns for one in results] or [pd.DataFrame(columns=[*_COLUMNS])]
    cells = cells.join(pd.concat(columns).astype(_COLUMNS))
    of_pool = cells["pool"].map({one.pool: one.unsettled for one in results})
    cells["unsettled"] = of_pool.eq(True)
    cells["beats"] = [own if isinstance(own, tuple) else () for own in cells["beats"]]
    keys = cells.drop_duplicates("pool")[["pool", *BUDGET]]
    pairs, orderings = (
        keys.merge(pd.concat(frames), on="pool").drop(columns="pool") if frames else pd.DataFrame()
        for frames in ([o.pairs for o in results if len(o.pairs)], [o.seen for o in results if len(o.seen)])
    )
    return Ranking(cells.drop(columns="pool"), pairs, orderings)


_COLUMNS = {
    "rank_low": float,
    "rank_high": float,
    "comparisons": float,
    "doubt": object,
    "nll_to_dense": float,
    "nll_to_dense_low": float,
    "nll_to_dense_high": float,
    "beats": object,
}


@dataclass(frozen=True)
class _Judged:
    """What is known of one pool: `_COLUMNS` of its members, its pairs, and its orderings."""

    pool: int
    columns: pd.DataFrame
    pairs: pd.DataFrame
    seen: pd.DataFrame
    unsettled: bool


def _best_rate(cells: pd.DataFrame) -> pd.Series[bool]:
    """Whether each cell has the least mean loss among the learning rates of its model."""
    first = cells.sort_values(["nll_mean", "learning_rate"], kind="stable")
    found = ~first.duplicated([*SEARCH, "state_policy"])
    return found.reindex(cells.index)


def _declared(cells: pd.DataFrame, records: pd.DataFrame) -> dict[int, Row]:
    """What orderings are found by, of each cell."""
    own = records.groupby("number", sort=False)
    params, state = own["variant_params"].first(), own["state_bytes"].median()
    reset = own["nll_reset"].count() > 0
    keys = ["number", "variant", "label", "seq_len", "depth"]
    found = cells[keys].assign(
        variant_params=cells["number"].map(params),
        state_bytes=cells["number"].map(state),
        has_reset=cells["number"].map(reset),
    )
    return {int(row["number"]): {str(k): v for k, v in row.items()} for row in found.to_dict("records")}


def _family(own: pd.DataFrame) -> tuple[Ints, Ints]:
    """The pairs of a pool's models that are compared: all; of too many, each with dense; else none."""
    first, second = np.triu_indices(len(own), 1)
    if len(first) <= MOST_COMPARISONS:
        return first, second
    full = _full(own)
    others = np.array([place for place in range(len(own)) if place != full], dtype=np.int64)
    if full is None or len(others) > MOST_COMPARISONS:
        return first[:0], second[:0]
    return others, np.full(len(others), full)


def _full(own: pd.DataFrame) -> int | None:
    """The place of the model that the others are set against: the first dense one by label, of those of
    torch's fused attention if there are any."""
    dense = [
        ("impl=sdpa" not in label, label, place)
        for place, (variant, label) in enumerate(zip(own["variant"], own["label"], strict=True))
        if variant == FULL
    ]
    return min(dense)[-1] if dense else None


def _judge(own: pd.DataFrame, pool: Pool, declared: Mapping[int, Row]) -> _Judged:
    first, second = _family(own)
    differences = pool.compared(first, second)
    prior = differences.prior(pool.most_freedom)
    judged = differences.judged(prior)
    takes_part = ~own[["undertrained", "no_baseline"]].eq(True).any(axis=1).to_numpy()
    in_family = takes_part[first] & takes_part[second]
    corrected = np.full(len(first), np.nan)
    corrected[in_family] = judged.corrected(in_family)
    better = _better(len(own), first, second, judged.mean, corrected)

    seen = _orderings([declared[number] for number in own.index], own, pool, prior)
    unsettled = any(row["verdict"] != SHOWN for row in seen)
    comparisons = int(in_family.sum())
    has_rank = takes_part & (not unsettled) & (comparisons > 0 or takes_part.sum() == 1)
    doubt = OF_REPLICATES if pool.text is None else OF_BOTH
    numbers = own.index.to_numpy()
    low, high = (np.full(len(own), np.nan) for _ in range(2))
    low[has_rank] = 1 + better[:, has_rank].sum(axis=0)
    high[has_rank] = takes_part.sum() - better[has_rank].sum(axis=1)
    columns = pd.DataFrame(
        {
            "rank_low": low,
            "rank_high": high,
            "comparisons": float(comparisons),
            "doubt": doubt,
            **_to_dense(own, pool, prior),
            "beats": [tuple(numbers[row].tolist()) for row in better & has_rank[:, None]],
        },
        index=own.index,
    )
    ends = judged.interval
    labels = own["label"].to_numpy()
    pairs = pd.DataFrame(
        {
            "pool": own["pool"].iloc[0],
            "first": labels[first],
            "second": labels[second],
            "nll_difference": judged.mean,
            "nll_difference_low": ends[0],
            "nll_difference_high": ends[1],
            "p": judged.p,
            "p_corrected": corrected,
            "comparisons": comparisons,
            "replicates": differences.replicates,
            "doubt": doubt,
        }
    )
    at = int(own["pool"].iloc[0])
    return _Judged(at, columns, pairs, pd.DataFrame(seen).assign(pool=at), unsettled)


def _better(n: int, first: Ints, second: Ints, mean: Floats, corrected: Floats) -> npt.NDArray[np.bool_]:
    """(n, n) whether the model of a row is certainly better than that of a column: by their own comparison,
    or because a third is between them."""
    better = np.zeros((n, n), dtype=bool)
    certain = corrected < FALSE
    lower, higher = np.where(mean < 0, first, second), np.where(mean < 0, second, first)
    better[lower[certain], higher[certain]] = True
    for third in range(n):
        better |= np.outer(better[:, third], better[third])
    return better


def _to_dense(own: pd.DataFrame, pool: Pool, prior: Prior) -> dict[str, Floats]:
    """The difference of each model to dense with its interval; NaN without dense, and of dense itself."""
    figures = np.full((3, len(own)), np.nan)
    full = _full(own)
    if full is not None:
        others = np.array([place for place in range(len(own)) if place != full], dtype=np.int64)
        judged = pool.compared(others, np.full(len(others), full)).judged(prior)
        figures[:, others] = judged.mean, *judged.interval
    return dict(zip(("nll_to_dense", "nll_to_dense_low", "nll_to_dense_high"), figures, strict=True))


def _orderings(rows: Sequence[Row], own: pd.DataFrame, pool: Pool, prior: Prior) -> list[dict[str, Any]]:
    """The orderings that the pool can show, with the interval of their difference and what it says."""
    places = {number: place for place, number in enumerate(own.index)}
    found = []
    for ordering, pair in expected(rows):
        first, second = (np.array([places[number]]) for number in (pair.first, pair.second))
        if pair.reset:
            judged = pool.without_state(first).judged(Prior(0.0, 0.0, 0))
        else:
            judged = pool.compared(first, second).judged(prior)
        low, high = (float(end[0]) for end in judged.interval)
        other = own.iloc[places[pair.second]]
        found.append(
            {
                "ordering": ordering.name,
                "expected": pair.words,
                "why": ordering.why,
                "nll_difference": float(judged.mean[0]),
                "nll_difference_low": low,
                "nll_difference_high": high,
                "nll_margin": pair.margin * other["nll_mean"],
                "bits_per_byte_per_nat": other["bits_per_byte_mean"] / other["nll_mean"],
                "verdict": verdict(low, high, pair.margin * other["nll_mean"]),
            }
        )
    return found
