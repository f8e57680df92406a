"""Modifications of one model by task: their costs, early and final losses, and differences to the default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.records.record import MODEL_OPTIONS
from bench.report.data.baselines import unranked
from bench.report.data.compared_time import SECONDS
from bench.report.data.disturbed import DISTURBED
from bench.report.data.groups import CELL, GROUP, SEARCH, SLOT_COLUMNS, TRAINING, varying
from bench.report.data.intervals import LEVEL, NORMAL
from bench.report.data.pool import Pool
from bench.report.data.statistics import LEAK_LIMIT, status_counts
from bench.report.sections.modifications.names import (
    DEFAULT,
    configurations,
    names_of,
    part_of,
    reference_of,
    slots_of,
)
from bench.report.text.phrases import describe, training

BITS, NATS, ACCURACY = "bits per byte", "nats per token", "accuracy"
"""The final figure of a task."""
SHOWN = 3
"""Decimals of an accuracy by which models are ranked: a tenth of a per cent, as tables show it."""
_OPTIONS = {*SLOT_COLUMNS.values(), *MODEL_OPTIONS}
PLACE = tuple(key for key in (*GROUP, "seq_len") if key not in _OPTIONS)
TASK = (*PLACE, *(key for key in TRAINING if key != "learning_rate"))
"""Keys that the models of one task share; each has its own learning rate."""
PAGE = ("machine",)
"""Keys of tasks that are compared with each other."""


def modification_cells(
    frame: pd.DataFrame, cost: pd.DataFrame, quality: pd.DataFrame, searches: pd.DataFrame
) -> pd.DataFrame:
    """One row a task and model, the default first; empty where no task has models with different slots.

    `frame` has the records, `cost` and `quality` the cells of these sections, `searches` the searches for a
    learning rate. Columns: the keys of `TASK`; `pool` (the number of the task), `task` (its name), `figure`
    (of `BITS`, `NATS`, `ACCURACY`); `modification` and the `part` of the model that it changes; `params`,
    `params_active`, `token_flops` (of a training step), `steps_per_second` with `DISTURBED`; `learning_rate`,
    and `rate_decided`: whether its search told it from the next best (None without a search, or with one
    replicate); `early` with `early_share` (the loss with the smallest budget of a run, and its share of the
    training); `guess` (the accuracy of guessing, of a task with answers); `value` and `deviation` over
    `replicates`, `by_replicate` (the value of each); `difference` to the default with its 95 % `_low` and
    `_high`, `differs` (null where nothing decides), `comparisons` of its family; `leaks`, `undertrained` and
    `no_baseline`, as in the section on quality; `guesses` (its accuracy is not above that of guessing);
    `score` (the value as it is ranked, more is better: NaN of what no table ranks, accuracies to a tenth of a
    per cent, that of guessing for all that guess) and `rank` (1 is the best of the task's models); and
    `unfinished`: the replicates without a result, with their reason.

    Losses are means over replicates at a model's best learning rate, at which as few replicates as possible
    failed.
    """
    rows = frame.assign(configuration=configurations(frame)) if len(frame) else frame
    rows = _of_several_slots(rows)
    if rows.empty:
        return pd.DataFrame()
    pools = [list(own["configuration"].unique()) for _, own in rows.groupby("pool")]
    reference = reference_of(pools)
    names = names_of(pools, reference)
    parts = {text: part_of(text, reference) for text in names}
    rows = rows.assign(modification=rows["configuration"].map(names), part=rows["configuration"].map(parts))
    rows["task"] = rows["pool"].map(_task_names(rows))
    found = [_of_task(own) for _, own in rows.groupby("pool", sort=False)]
    cells = _with_cost(pd.concat(found, ignore_index=True), cost)
    return _ranked(_with_search(cells, searches), quality)


def _of_several_slots(rows: pd.DataFrame) -> pd.DataFrame:
    """The records of tasks in which models with different slots finished, with their `pool`."""
    if rows.empty:
        return rows
    rows = rows.sort_values(["written", "cell_id"], kind="stable")
    rows = rows.assign(pool=rows.groupby(list(TASK), sort=False, dropna=False).ngroup())
    done = rows[(rows["status"] == "ok") & rows["nll"].notna()]
    slots = done["configuration"].map(slots_of).groupby(done["pool"]).nunique()
    rows = rows[rows["pool"].isin(slots[slots > 1].index)]
    kept: pd.DataFrame = rows[(rows["status"] != "ok") | rows["nll"].notna()]
    return kept


def _task_names(rows: pd.DataFrame) -> dict[int, str]:
    """Pool → the data, of text the objective, and what else tells it from the others."""
    first = rows.drop_duplicates("pool")
    tasks = [{str(key): value for key, value in row.items()} for row in first.to_dict("records")]
    answers = {*rows.loc[rows["accuracy"].notna(), "pool"]}
    plain = [
        own["corpus"] if own["pool"] in answers else f"{own['corpus']}, {own['objective']}" for own in tasks
    ]
    found = {}
    for own, name in zip(tasks, plain, strict=True):
        alike = first[[other == name for other in plain]]
        keys = [key for key in varying(alike, TASK) if key not in ("corpus", "objective", *PAGE)]
        words = describe(own, [key for key in keys if key in PLACE])
        found[int(own["pool"])] = ", ".join(word for word in (name, words, *training(own, keys)) if word)
    return found


def _of_task(own: pd.DataFrame) -> pd.DataFrame:
    """The rows of one task."""
    done = own[own["status"] == "ok"]
    figure = BITS if done["bits_per_byte"].notna().any() else NATS
    figure = ACCURACY if done["accuracy"].notna().any() else figure
    ordered = own.assign(later=own["modification"] != DEFAULT).sort_values("later", kind="stable")
    parts = [_at_best_rate(part) for _, part in ordered.groupby("modification", sort=False)]
    rows = [_summed_up(part, figure) for part in parts]
    return pd.concat([pd.DataFrame(rows), _compared(parts, figure)], axis=1)


def _at_best_rate(own: pd.DataFrame) -> pd.DataFrame:
    """The records of a model at one learning rate, with those that failed before it was known."""
    done = own[own["status"] == "ok"]
    if done.empty:
        return own
    failed = own.loc[own["status"] != "ok", "learning_rate"]
    rates = done.groupby("learning_rate", dropna=False)["nll"].mean()
    best = min(rates.index, key=lambda rate: (int((failed == rate).sum()), rates[rate], rate))
    at_best = own["learning_rate"].isna() if pd.isna(best) else own["learning_rate"] == best
    unknown = (own["status"] != "ok") & own["learning_rate"].isna()
    return own[at_best | unknown]


def figures_of(own: pd.DataFrame, figure: str) -> pd.Series[float]:
    """The final figure of each record."""
    return own[{BITS: "bits_per_byte", NATS: "nll", ACCURACY: "accuracy"}[figure]].astype(float)


def _summed_up(own: pd.DataFrame, figure: str) -> dict[str, Any]:
    done, lost = own[own["status"] == "ok"], own[own["status"] != "ok"]
    first = (done if len(done) else own).iloc[0]
    values = figures_of(done, figure)
    early, share = _early(done, figure)
    return {
        **{key: first[key] for key in (*CELL, *TRAINING, "pool", "task", "modification", "part")},
        "figure": figure,
        "guess": own["guess_accuracy"].median() if figure == ACCURACY else np.nan,
        "early": early,
        "early_share": share,
        "value": values.mean(),
        "deviation": values.std(),
        "replicates": int(done["replicate"].nunique()),
        "by_replicate": values.groupby(done["replicate"]).mean().to_dict(),
        "guesses": figure == ACCURACY and _guesses(done),
        "leaks": bool(done["leak_max_abs"].max() > LEAK_LIMIT),
        "unfinished": _unfinished(lost, len(own)),
    }


def _guesses(done: pd.DataFrame) -> bool:
    """Whether the mean accuracy lies within the 95 % interval of guessing, or below. All replicates answer
    the same questions, so these count once."""
    guess, answers = done["guess_accuracy"].median(), done["tokens_evaluated"].median()
    return bool(done["accuracy"].mean() <= guess + NORMAL * np.sqrt(guess * (1 - guess) / answers))


def _early(done: pd.DataFrame, figure: str) -> tuple[float, float]:
    """The mean loss with the smallest of several budgets, in bits per byte for `BITS` and else in nats per
    token, and the share of the training that it is; NaN where runs have one budget."""
    losses, shares = [], []
    for sizes, nlls, nll, bits in zip(
        done["train_budgets"], done["nll_by_budget"], done["nll"], done["bits_per_byte"], strict=True
    ):
        if not isinstance(sizes, list) or not isinstance(nlls, list) or len(sizes) < 2 or nlls[0] is None:
            continue
        losses.append(nlls[0] * (bits / nll if figure == BITS else 1.0))
        shares.append(sizes[0] / sizes[-1])
    return (float(np.mean(losses)), float(np.mean(shares))) if losses else (np.nan, np.nan)


def _unfinished(lost: pd.DataFrame, total: int) -> str:
    """'diverged, 1 of 3: the loss is nan after 12 steps'; empty if all finished."""
    if lost.empty:
        return ""
    reasons = "; ".join(dict.fromkeys(lost["reason"].fillna("no reason recorded")))
    status = status_counts(lost["status"])
    return f"{status}, {len(lost)} of {total}: {reasons}" if len(lost) < total else f"{status}: {reasons}"


def _compared(parts: Sequence[pd.DataFrame], figure: str) -> pd.DataFrame:
    """The differences of the models of one task to its default, which is the first of them."""
    records = pd.concat([part[part["status"] == "ok"].assign(number=at) for at, part in enumerate(parts)])
    factor = 1.0
    if figure == BITS:
        factor = float((records["bits_per_byte"] / records["nll"]).mean())
    elif figure == ACCURACY:  # shares of right answers have no blocks of text
        records = records.assign(nll=records["accuracy"], nll_by_block=None)
    count = len(parts)
    columns = dict.fromkeys(("difference", "difference_low", "difference_high"), np.nan)
    found = pd.DataFrame(columns, index=range(count))
    found = found.assign(differs=pd.array([pd.NA] * count, "boolean"), comparisons=0)
    if parts[0]["modification"].iloc[0] != DEFAULT:
        return found
    pool = Pool.of(records, range(count))
    others = np.arange(1, count)
    differences = pool.compared(others, np.zeros(count - 1, dtype=np.int64))
    judged = differences.judged(differences.prior(pool.most_freedom))
    low, high = judged.interval
    decided = ~np.isnan(low)
    corrected = judged.corrected(decided)
    found.loc[others, "difference"] = factor * judged.mean
    found.loc[others, "difference_low"], found.loc[others, "difference_high"] = factor * low, factor * high
    found.loc[others[decided], "differs"] = corrected < 1 - LEVEL
    found["comparisons"] = int(decided.sum())
    return found


def _with_cost(cells: pd.DataFrame, cost: pd.DataFrame) -> pd.DataFrame:
    """Add the figures of the same cells' cost."""
    columns = ["params", "params_active", "flops_algorithmic_step", f"{SECONDS}_median", DISTURBED]
    merged = cells.merge(cost[[*CELL, *columns]], "left", list(CELL))
    tokens = merged["batch_size"] * merged["seq_len"]
    return merged.assign(
        params_active=merged["params_active"].fillna(merged["params"]),
        token_flops=merged["flops_algorithmic_step"] / tokens,
        steps_per_second=1 / merged[f"{SECONDS}_median"],
        **{DISTURBED: merged[DISTURBED].eq(True)},
    ).drop(columns=["flops_algorithmic_step", f"{SECONDS}_median"])


def _with_search(cells: pd.DataFrame, searches: pd.DataFrame) -> pd.DataFrame:
    """Add whether the search of the same cells decided their rate."""
    if searches.empty:
        return cells.assign(rate_decided=None)
    keys = [*SEARCH, "learning_rate"]
    decided = searches[[*keys, "decided"]].rename(columns={"decided": "rate_decided"})
    return cells.merge(decided, "left", keys)


def _ranked(cells: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """Add why a model has no rank, its score, and its rank."""
    keys = [*CELL, *TRAINING]
    standing = quality.groupby(keys, dropna=False)[["undertrained", "no_baseline", "unsettled"]].max()
    cells = cells.merge(standing.reset_index(), "left", keys)
    value = cells["value"].where(~cells["guesses"], cells["guess"])
    shares = cells["figure"] == ACCURACY
    value = value.where(~shares, value.round(SHOWN))  # one answer in thousands more is no better rank
    signed = value * np.where(shares, 1.0, -1.0)
    cells["score"] = signed.where(~unranked(cells))
    cells["rank"] = cells.groupby("pool")["score"].rank(ascending=False)
    return cells.drop(columns="unsettled")


def scores_of(cells: pd.DataFrame) -> pd.DataFrame:
    """Modification × task, without the default: the score, which is NaN of what no table ranks."""
    own = cells[cells["modification"] != DEFAULT]
    table = own.pivot(index="modification", columns="pool", values="score")
    return table.reindex(index=own["modification"].unique())
