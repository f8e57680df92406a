"""What quality costs: models trained on equally many tokens, and which of them nothing beats in both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from bench.report.groups import COMMON, TRAINING, split
from bench.report.rates import at_best_rate
from bench.report.spread import interval
from bench.report.statistics import BASELINE, LEAK_LIMIT
from bench.report.style import strategy_rank

COSTS = {"time": "step_seconds_median", "memory": "peak_bytes", "flops": "flops_executed_step"}
"""Name of a cost → the figure of a record."""
POOL = (
    *COMMON,
    "depth",
    "seq_len",
    *(key for key in TRAINING if key != "learning_rate"),
    "tokens_trained",
)
"""What models that stand against each other share: all but variant, rate and how activations are saved."""
_MODEL = [*POOL, "variant", "label", "activations"]
FRONT, NOISE, BEATEN = "front", "noise", ""


def pareto_cells(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a trained model of every pool of two or more; may be empty.

    Columns: the keys of `POOL`, `variant`, `label`, `activations`, `learning_rate` (each model's best: that
    of the least mean loss), `score` (nll or accuracy), `quality` (its mean over replicates) with the 95 %
    interval `quality_low` to `quality_high`, for each of `COSTS` the median `X` with `X_low` and `X_high`,
    `replicates`, `leaks`, and for each cost `X_front`: 'front' where no other model is better in both,
    'noise' where some are but none beyond the intervals of both, '' else. What leaks is on no front and
    keeps nobody off one.
    """
    ok = frame[(frame["status"] == "ok") & (frame["nll"].notna() | frame["accuracy"].notna())]
    ok = ok[ok["tokens_trained"] > 0]
    if ok.empty:
        return pd.DataFrame()
    models = split(at_best_rate(ok, _MODEL), _MODEL)
    cells = pd.DataFrame([_row(values, own) for values, own in models])
    cells = pd.concat([_fronts(pool) for _, pool in split(cells, POOL) if len(pool) > 1] or [cells.iloc[:0]])
    if cells.empty:
        return pd.DataFrame()
    cells["later"] = cells["variant"] != BASELINE
    cells["rank"] = [strategy_rank(name) for name in cells["activations"]]
    order = [*POOL, "later", "label", "rank"]
    return cells.sort_values(order, ignore_index=True, kind="stable").drop(columns=["later", "rank"])


def pools(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """The parts of `pareto_cells` whose models stand against each other, with what they share."""
    return split(cells, POOL)


def _row(values: dict[str, Any], own: pd.DataFrame) -> dict[str, Any]:
    score = "accuracy" if own["accuracy"].notna().all() else "nll"
    low, high = interval(own[score], np.mean)
    row = {
        **values,
        "learning_rate": own["learning_rate"].iloc[0],
        "score": score,
        "quality": own[score].mean(),
        "quality_low": low,
        "quality_high": high,
        "replicates": own["replicate"].nunique(),
        "leaks": bool((own["leak_max_abs"] > LEAK_LIMIT).any()),
    }
    for name, column in COSTS.items():
        low, high = interval(own[column])
        row |= {name: own[column].median(), f"{name}_low": low, f"{name}_high": high}
    return row


class _Span(NamedTuple):
    """A figure of which less is better, and its interval."""

    middle: float
    low: float
    high: float


def _span(row: pd.Series[Any], name: str) -> _Span:
    """Without an interval, as with one replicate, it is the figure itself."""
    middle, low, high = (float(row[name + end]) for end in ("", "_low", "_high"))
    if np.isnan(low):
        low = high = middle
    return (
        _Span(-middle, -high, -low)
        if name == "quality" and row["score"] == "accuracy"
        else _Span(middle, low, high)
    )


def _fronts(pool: pd.DataFrame) -> pd.DataFrame:
    """The pool with its fronts marked."""
    rows = [row for _, row in pool.iterrows()]
    marks = {}
    for cost in COSTS:
        spans = [(_span(row, "quality"), _span(row, cost)) for row in rows]
        sound = [pair for pair, row in zip(spans, rows, strict=True) if not row["leaks"]]
        marks[f"{cost}_front"] = [
            BEATEN if row["leaks"] else _place(pair, sound) for pair, row in zip(spans, rows, strict=True)
        ]
    return pool.assign(**marks)


def _place(mine: tuple[_Span, _Span], others: list[tuple[_Span, _Span]]) -> str:
    """Where a model stands among the others of its pool, by quality and a cost; nowhere without the cost."""
    if np.isnan(mine[1].middle):
        return BEATEN
    better = [theirs for theirs in others if _beats(theirs, mine)]
    if any(all(one.high <= own.low for one, own in zip(theirs, mine, strict=True)) for theirs in better):
        return BEATEN
    return NOISE if better else FRONT


def _beats(one: tuple[_Span, _Span], other: tuple[_Span, _Span]) -> bool:
    """Whether one is as good in both and better in one."""
    pairs = [(a.middle, b.middle) for a, b in zip(one, other, strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
