"""Judgements about the losses of trained models, each against another one of the same setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import Spread, difference, finished, has
from bench.claims.parts import above, below, like, one_setting, points, reason

NEAR = 0.02
"""Nats per token up to which a loss is *near* another one: two per cent of perplexity. It is a margin against
noise: replicates of these small models differ by about as much."""

Params = Mapping[str, Any]


def trained(frame: pd.DataFrame, variant: str) -> pd.DataFrame:
    """Return the trained causal language models of a variant. Raises Missing if there are none."""
    return has(finished(frame, variant=variant, objective="clm", measure="standard"), "nll")


def longer(rows: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Return the rows with these figures of sequences that are longer than in training, in one setting and
    with one set of knobs. Raises Missing, with the knob that takes them."""
    try:
        rows = one_setting(has(rows, *names))
    except Missing as error:
        raise Missing(f"{error}, taken with measure.longer=4") from None
    same: pd.DataFrame = rows[rows["params_json"] == rows.iloc[0]["params_json"]]
    return same


def knobs_that(rows: pd.DataFrame, fits: Callable[[Params], bool], words: str) -> pd.DataFrame:
    """Return the rows whose variant's knobs satisfy a condition; `words` names it if none does (Missing)."""
    found = rows[rows["variant_params"].map(lambda params: bool(fits(params)))]
    if found.empty:
        raise Missing(f"variant={rows.iloc[0]['variant']} {words}, trained")
    return found


def in_setting_of(rows: pd.DataFrame, own: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in the setting of others (`parts.ALIKE`). Raises Missing if there are none."""
    return finished(rows, variant=rows.iloc[0]["variant"], **like(own))


def pair(own: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return both in one setting, that of `own`. Raises Missing if there is no `other` in it."""
    own = one_setting(own)
    return own, in_setting_of(other, own)


def better(own: pd.DataFrame, other: pd.DataFrame, names: tuple[str, str], predicted: str) -> Judgement:
    """Judge whether the loss of `own` is below that of `other`, in one setting, paired by replicate."""
    own, other = pair(own, other)
    gain = difference(other, own, "nll")
    verdict = above(gain)
    return Judgement(
        predicted=predicted,
        measured=f"Loss of {names[1]} minus that of {names[0]}: {gain.text(points)} nats per token, after "
        f"{_training(own)}.",
        verdict=verdict,
        reason=reason(verdict, f"{names[1]} is better than {names[0]}", gain),
    )


def near(
    own: pd.DataFrame,
    base: pd.DataFrame,
    worse: pd.DataFrame,
    names: tuple[str, str, str],
    predicted: str,
) -> Judgement:
    """Judge whether the loss of `own` is at most `NEAR` above that of `base`, and that of `worse` is not.

    If `worse` is as near, the comparison decides nothing: there is no loss that `own` could have avoided.
    """
    own, base = pair(own, base)
    excess, missed = (difference(rows, base, "nll") for rows in (own, in_setting_of(worse, own)))
    differs = above(missed, NEAR)
    verdict = below(excess, NEAR)
    words = reason(verdict, f"it loses {points(excess.middle)} nats per token", excess)
    if verdict == "shown" and differs != "shown":
        verdict = "not decided here"
        words = f"would need a setting in which {names[2]} loses more than {NEAR:g} to {names[1]}"
    return Judgement(
        predicted=predicted,
        measured=f"Loss minus that of {names[1]}, after {_training(own)}: {names[0]} {_nats(excess)}, "
        f"{names[2]} {_nats(missed)} nats per token. Up to {NEAR:g} is near.",
        verdict=verdict,
        reason=words,
    )


def _nats(spread: Spread) -> str:
    return spread.text(points)


def _training(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    return (
        f"{first['tokens_trained']:,.0f} tokens of training, {first['depth']} layers, {first['seq_len']:,} "
        "tokens a sequence"
    )
