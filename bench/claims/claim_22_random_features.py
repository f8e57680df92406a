"""Random features of Performer: orthogonal or independent directions, new draws, and ReLU features."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import Spread, by_replicate, has, ratio
from bench.claims.losses import Params, better, in_setting_of, knobs_that, trained
from bench.claims.parts import above, knob, one_setting, reason, share
from bench.report.text import units

STATEMENT = (
    "Orthogonal features estimate softmax better than independent ones; drawing new features in training "
    "helps; ReLU features learn better than those that estimate softmax."
)
SOURCE = (
    "Choromanski 2020, arXiv:2009.14794, §4.2 and Figure 4 (orthogonal); §4.3 and Figure 5 (redrawing, on "
    "PG-19); §4.4 and Figure 6 (ReLU, on proteins)"
)
USUAL: dict[str, Any] = {"features": "softmax", "orthogonal": True, "redraw": 0}
BETTER = 1.05
"""Ratio of errors above which one is *better*: a margin against the noise of draws."""


def _pair(frame: pd.DataFrame, name: str, words: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the usual cells and those in which only the knob `name` is another one."""
    rows = trained(frame, "performer")

    def is_other(params: Params) -> bool:
        return all((params[key] == usual) != (key == name) for key, usual in USUAL.items())

    other = one_setting(knobs_that(rows, is_other, words))
    params = dict(other.iloc[0]["variant_params"])
    usual = {**params, name: USUAL[name]}
    return (
        knobs_that(in_setting_of(rows, other), lambda own: dict(own) == usual, f"{name}={USUAL[name]}"),
        knobs_that(other, lambda own: dict(own) == params, words),
    )


def orthogonal(frame: pd.DataFrame) -> Judgement:
    """Judge the error of the initial layers' outputs, on held-out text."""
    own, other = _pair(frame, "orthogonal", "orthogonal=false")
    own, other = (has(rows, "softmax_error_initial") for rows in (own, other))
    times = ratio(other, own, "softmax_error_initial")
    errors = [Spread.of(by_replicate(rows, "softmax_error_initial")).middle for rows in (own, other)]
    verdict = above(times, BETTER)
    return Judgement(
        predicted="Orthogonal directions have a smaller variance for any number of channels (Theorem 2).",
        measured=f"Relative error before training with {int(knob(own, 'n_features').iloc[0])} features: "
        f"{share(errors[0])} orthogonal, {share(errors[1])} independent, {times.text(units.ratio)} as much. "
        f"More than {units.ratio(BETTER)} is better.",
        verdict=verdict,
        reason=reason(verdict, "independent directions are as good", times),
    )


def redraw(frame: pd.DataFrame) -> Judgement:
    """Judge the loss with new draws against that with the first ones."""
    once, again = _pair(frame, "redraw", "redraw > 0")
    steps = int(knob(again, "redraw").iloc[0])
    return better(
        again,
        once,
        (f"a draw every {steps} steps", "one draw"),
        "None: with new draws the weights cannot adapt to the error of one draw, and cannot profit from it.",
    )


def relu(frame: pd.DataFrame) -> Judgement:
    """Judge the loss of ReLU features against that of softmax features."""
    softmax, other = _pair(frame, "features", "features=relu")
    return better(
        other, softmax, ("ReLU features", "softmax features"), "None: ReLU features estimate no softmax."
    )


PARTS = {
    "Orthogonal features have a smaller error than independent ones": orthogonal,
    "New draws in training lower the loss": redraw,
    "ReLU features have a lower loss than softmax features": relu,
}
