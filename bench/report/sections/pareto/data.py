"""Quality against cost: models trained on equally many tokens, and those that no other model dominates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.report.data.baselines import BASELINES, unranked
from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import COMMON, TRAINING, split
from bench.report.data.intervals import of_mean, of_share
from bench.report.data.statistics import BASELINE
from bench.report.figures.style import strategy_rank

COSTS = {"time": SECONDS, "memory": "peak_bytes", "flops": "flops_executed_step"}
"""Name of a cost → its column in the summary, or the prefix of its columns."""
POOL = (
    *COMMON,
    "depth",
    "seq_len",
    *(key for key in TRAINING if key != "learning_rate"),
    "tokens_trained",
)
"""Keys that comparable models share: all but variant, learning rate and activation strategy."""
_MODEL = [*POOL, "variant", "label", "activations"]
FRONT, NOISE, BEATEN = "front", "noise", ""
SCORES = {"accuracy": "accuracy", "bits_per_byte": "bits per byte", "nll": "nats per token"}
"""Figures of quality in words; a model has the first that was taken."""


def on_a_front(cells: pd.DataFrame) -> set[str]:
    """The variants that are on the front of any cost; takes `pareto_cells`."""
    fronts = cells[[f"{name}_front" for name in COSTS]] == FRONT
    return set(cells.loc[fronts.any(axis=1), "variant"])


def pareto_cells(summary: pd.DataFrame) -> pd.DataFrame:
    """One row a trained model of every pool of two or more; may be empty. Takes `statistics.summary`.

    Columns: the keys of `POOL`, `variant`, `label`, `activations`, `learning_rate` (each model's best: that
    of the least mean loss), `score` (a key of `SCORES`), `quality` (its mean over replicates) with its
    interval `quality_low` to `quality_high`, for each of `COSTS` the median `X` with `X_low` and `X_high`,
    `replicates`, `leaks`, `undertrained`, `no_baseline`, `unsettled`, the baselines, and for each cost
    `X_front`: 'front' where no other model is better in both, 'noise' where some are but none beyond the
    intervals of both, '' else. What is not ranked (`baselines.unranked`) is on no front and keeps nobody off
    one; so is, on the front of time, a model with disturbed measurements alone (`disturbed`). Two times
    differ beyond their intervals only if they are also further apart than the noise floor.
    """
    trained = summary[(summary["tokens_trained"] > 0) & summary["nll_mean"].notna()]
    if trained.empty:
        return pd.DataFrame()
    lowest = trained.groupby(_MODEL, dropna=False)["nll_mean"].transform("min")
    cells = _scored(trained[trained["nll_mean"] == lowest])
    several = [_fronts(pool) for _, pool in split(cells, POOL) if len(pool) > 1]
    if not several:
        return pd.DataFrame()
    cells = pd.concat(several)
    cells["later"] = cells["variant"] != BASELINE
    cells["rank"] = [strategy_rank(name) for name in cells["activations"]]
    order = [*POOL, "later", "label", "rank"]
    return cells.sort_values(order, ignore_index=True, kind="stable").drop(columns=["later", "rank"])


def _scored(models: pd.DataFrame) -> pd.DataFrame:
    """The columns of a model before the fronts."""
    taken = [models[f"{name}_mean"].notna() for name in SCORES]
    counts = models["quality_replicates"]
    own = (
        *_MODEL,
        "learning_rate",
        "leaks",
        "undertrained",
        "no_baseline",
        "unsettled",
        DISTURBED,
        "noise_floor",
        *BASELINES,
    )
    columns: dict[str, Any] = {key: models[key] for key in own}
    columns["score"] = np.select(taken, list(SCORES), "")
    columns["replicates"] = counts
    mean, deviation = (
        pd.Series(np.select(taken, [models[f"{name}_{end}"] for name in SCORES], np.nan), models.index)
        for end in ("mean", "std")
    )
    figures = mean.to_numpy(dtype=float), deviation.to_numpy(dtype=float), counts
    accurate = columns["score"] == "accuracy"
    low, high = (
        np.where(accurate, *ends) for ends in zip(of_share(*figures), of_mean(*figures), strict=True)
    )
    columns |= {"quality": mean, "quality_low": low, "quality_high": high}
    for name, column in COSTS.items():
        whole = f"{column}_median" if f"{column}_median" in models else column
        columns[name] = models[whole]
        for end in ("low", "high"):
            columns[f"{name}_{end}"] = models.get(f"{column}_{end}", np.nan)
    return pd.DataFrame(columns)


def pools(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The parts of `pareto_cells` whose models are comparable, with the keys that they share."""
    return split(cells, POOL)


class _Span(NamedTuple):
    """A figure of which less is better, and its interval."""

    middle: float
    low: float
    high: float


def _span(row: pd.Series[Any], name: str) -> _Span:
    """Without an interval, as with one replicate, it is the figure itself. That of a time is as wide as the
    noise floor at least: two of them overlap where the times differ by less."""
    middle, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
    if np.isnan(low):
        low = high = middle
    if name == "time" and not np.isnan(row["noise_floor"]):
        half = float(np.sqrt(row["noise_floor"]))
        low, high = min(low, middle / half), max(high, middle * half)
    return (
        _Span(-middle, -high, -low)
        if name == "quality" and row["score"] == "accuracy"
        else _Span(middle, low, high)
    )


def _fronts(pool: pd.DataFrame) -> pd.DataFrame:
    """The pool with its fronts marked."""
    rows, left_out = [row for _, row in pool.iterrows()], list(unranked(pool))
    marks = {}
    for cost in COSTS:
        spans = [(_span(row, "quality"), _span(row, cost)) for row in rows]
        outs = [
            out or (cost == "time" and bool(row[DISTURBED])) for row, out in zip(rows, left_out, strict=True)
        ]
        sound = [pair for pair, out in zip(spans, outs, strict=True) if not out]
        marks[f"{cost}_front"] = [
            BEATEN if out else _place(pair, sound) for pair, out in zip(spans, outs, strict=True)
        ]
    return pool.assign(**marks)


def _place(own_spans: tuple[_Span, _Span], others: list[tuple[_Span, _Span]]) -> str:
    """A model's place among the others of its pool, by quality and a cost; '' without the cost."""
    if np.isnan(own_spans[1].middle):
        return BEATEN
    better = [other for other in others if _beats(other, own_spans)]
    if any(all(one.high <= own.low for one, own in zip(other, own_spans, strict=True)) for other in better):
        return BEATEN
    return NOISE if better else FRONT


def _beats(one: tuple[_Span, _Span], other: tuple[_Span, _Span]) -> bool:
    """Whether one is as good in both and better in one."""
    (quality, cost), (its_quality, its_cost) = ([span.middle for span in pair] for pair in (one, other))
    return quality <= its_quality and cost <= its_cost and (quality < its_quality or cost < its_cost)
