"""Compressive memory: its reach, and the benefit of learnt compression."""

from __future__ import annotations

from functools import partial

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.cells import difference, finished, has
from bench.claims.parts import above, like, one_setting, points, reaches, reason

STATEMENT = (
    "Compressive memory reaches rate × layers × window, and the learned compression with the reconstruction "
    "loss beats mean and max pooling."
)
SOURCE = "Rae 2019, arXiv:1911.05507, §3 and §4"


def reach(frame: pd.DataFrame) -> Judgement:
    """Judge the reach from cells at several depths."""
    return reaches(
        has(finished(frame, variant="compressive"), "reach"),
        ["segment", "mem_len", "comp_len", "rate"],
        lambda knobs: knobs["mem_len"] + knobs["rate"] * knobs["comp_len"],
        "(memory + rate × compressed memory)",
    )


def beats(frame: pd.DataFrame, pooling: str) -> Judgement:
    """Compare the learnt convolution with a pooling, everything else equal."""
    trained = has(finished(frame, variant="compressive"), "nll")
    conv = one_setting(finished(trained, knobs={"compression": "conv"}))
    knobs = {**conv.iloc[0]["variant_params"]}
    own = finished(conv, knobs=knobs, **like(conv))
    other = finished(trained, knobs={**knobs, "compression": pooling}, **like(conv))
    advantage = difference(other, own, "nll")
    verdict = above(advantage)
    return Judgement(
        predicted="A convolution can represent the mean of its group, so only its training can make it worse."
        if pooling == "mean"
        else "None: a convolution cannot represent a maximum.",
        measured=f"Loss of {pooling} pooling minus that of a convolution, after "
        f"{own.iloc[0]['tokens_trained']:,.0f} tokens of training: {advantage.text(points)} nats per token.",
        verdict=verdict,
        reason=reason(verdict, f"{pooling} pooling is better than a convolution", advantage),
    )


PARTS = {
    "The reach is (memory + rate × compressed memory) for each layer": reach,
    "The learnt compression beats mean pooling": partial(beats, pooling="mean"),
    "The learnt compression beats max pooling": partial(beats, pooling="max"),
}
