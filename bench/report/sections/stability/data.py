"""How stable the order of models is between replicates and budgets, and how well their curves predict."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from bench.report.data.groups import BUDGET
from bench.report.data.loss_fit import fit
from bench.report.figures.baselines import in_loss_unit

MODEL = ["label", "learning_rate", "state_policy"]
"""Keys of a model within a pool."""


def with_budgets(records: pd.DataFrame) -> pd.DataFrame:
    """The finished records of text, each once for each budget of its run: `tokens`, and `loss` in bits per
    byte, of masked text in nats per token.

    A record without `train_budgets` has one, its whole training.
    """
    ok = records[(records["status"] == "ok") & records["nll"].notna() & records["perplexity"].notna()]
    rows = zip(
        ok.index,
        ok["train_budgets"],
        ok["nll_by_budget"],
        ok["tokens_trained"],
        ok["nll"],
        in_loss_unit(ok),
        strict=True,
    )
    long = [
        (index, float(size), math.nan if loss is None else factor * float(loss))
        for index, sizes, losses, tokens, nll, factor in rows
        for size, loss in (_pairs(sizes, losses) or [(tokens, nll)])
    ]
    every = pd.DataFrame(long, columns=["index", "tokens", "loss"]).set_index("index")
    return every.join(ok[[*BUDGET, *MODEL, "replicate"]]).reset_index(drop=True)


def _pairs(sizes: Any, losses: Any) -> list[tuple[float, float | None]]:
    if not isinstance(sizes, list) or not isinstance(losses, list) or len(sizes) != len(losses):
        return []
    return [(size, loss) for size, loss in zip(sizes, losses, strict=True) if size is not None]


def kendall(first: pd.Series[float], second: pd.Series[float]) -> float:
    """Kendall's τ_b of the order of the models that both have: 1 for the same, −1 for the reverse; NaN for
    fewer than two models and if all are equal (Kendall 1945, Biometrika 33(3))."""
    both = pd.concat([first, second], axis=1).dropna().to_numpy()
    return float(stats.kendalltau(both[:, 0], both[:, 1]).statistic) if len(both) > 1 else math.nan


def orders(every: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One row a pool of two or more models that do not leak and of several replicates or budgets.

    Columns: the keys of `BUDGET`, `models`, `replicates`, `tau_replicates` (the mean over the pairs of
    replicates, at the largest budget), and `tau_budgets`: (tokens, τ to the order at the largest budget) of
    every other one, of the means over replicates. Takes `with_budgets` and the cells of quality.
    """
    sound = cells.loc[~cells["leaks"].eq(True) & ~cells["is_other_rate"], [*BUDGET, *MODEL]]
    keys = [*BUDGET, *MODEL]  # as objects, because a key without a value in one of them is a float there
    every = every.astype(dict.fromkeys(keys, object)).merge(sound.astype(object), on=keys)
    rows = []
    for values, own in every.groupby(list(BUDGET), sort=False, dropna=False):
        largest = own["tokens"] == own.groupby(MODEL, dropna=False)["tokens"].transform("max")
        last = own[largest].groupby([*MODEL, "replicate"], dropna=False)["loss"].mean().unstack("replicate")
        if len(last) < 2:
            continue
        taus = [kendall(last[a], last[b]) for a, b in combinations(last.columns, 2)]
        known = [tau for tau in taus if not math.isnan(tau)]
        of_budgets = _budgets(own)
        if not known and not of_budgets:
            continue
        rows.append(
            dict(zip(BUDGET, values, strict=True))
            | {
                "models": len(last),
                "replicates": last.shape[1],
                "tau_replicates": float(np.mean(known)) if known else math.nan,
                "tau_budgets": of_budgets,
            }
        )
    return pd.DataFrame(rows)


def _budgets(own: pd.DataFrame) -> list[tuple[float, float]]:
    """(tokens, τ to the largest) of the budgets that two or more models share with the largest."""
    means = own.groupby([*MODEL, "tokens"], dropna=False)["loss"].mean().unstack("tokens")
    *smaller, last = sorted(means.columns)
    found = [(float(size), kendall(means[size], means[last])) for size in smaller]
    return [(size, tau) for size, tau in found if not math.isnan(tau)]


def curves(every: pd.DataFrame) -> pd.DataFrame:
    """One row a model with several budgets, from the means over replicates: `budgets`, the fit's `floor`,
    `scale` and `exponent` (NaN without one), `at_bound`, `predicted` at the `largest` budget, and there what
    `came` with its standard deviation `spread` over replicates."""
    rows = []
    for values, own in every.groupby([*BUDGET, *MODEL], sort=False, dropna=False):
        by_size = own.groupby("tokens")["loss"]
        means = by_size.mean()
        if len(means) < 2:
            continue
        found = fit(list(means.index), list(means))
        rows.append(
            dict(zip((*BUDGET, *MODEL), values, strict=True))
            | {
                "budgets": len(means),
                "largest": means.index[-1],
                "floor": found.floor if found else math.nan,
                "scale": found.scale if found else math.nan,
                "exponent": found.exponent if found else math.nan,
                "at_bound": bool(found and found.at_bound),
                "predicted": found.predicted if found else math.nan,
                "came": means.iloc[-1],
                "spread": by_size.std().iloc[-1],
                "replicates": own["replicate"].nunique(),
            }
        )
    return pd.DataFrame(rows)
