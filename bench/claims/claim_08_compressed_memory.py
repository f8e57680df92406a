"""Compressive memory: its reach, and the benefit of learnt compression."""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Finding
from bench.claims.cells import difference, finished, has
from bench.claims.parts import Part, beyond, like, one_setting, points, reaches, together, unsure

STATEMENT = (
    "Compressive memory reaches rate × layers × window, and the learned compression with the reconstruction "
    "loss beats mean and max pooling."
)
SOURCE = "Rae 2019, arXiv:1911.05507, §3 and §4"


def judge(frame: pd.DataFrame) -> Finding:
    """Judge the reach from cells at several depths, and the quality from trained cells."""
    reached = has(finished(frame, variant="compressive"), "reach")
    far = reaches(
        reached,
        ["segment", "mem_len", "comp_len", "rate"],
        lambda knobs: knobs["mem_len"] + knobs["rate"] * knobs["comp_len"],
        "(memory + rate × compressed memory)",
    )
    trained = has(finished(frame, variant="compressive"), "nll")
    conv = one_setting(finished(trained, knobs={"compression": "conv"}))
    return together([far, _against(trained, conv, "mean"), _against(trained, conv, "max")])


def _against(trained: pd.DataFrame, conv: pd.DataFrame, pooling: str) -> Part:
    """Compare the learnt convolution with a pooling, everything else equal."""
    knobs = {**conv.iloc[0]["variant_params"]}
    own = finished(conv, knobs=knobs, **like(conv))
    other = finished(trained, knobs={**knobs, "compression": pooling}, **like(conv))
    advantage = difference(other, own, "nll")
    if advantage.middle > 0:
        but = f"a convolution is better than {pooling} pooling, but {unsure(advantage)}"
    elif advantage.low < 0 < advantage.high or advantage.count < 2:
        but = f"a convolution cannot be distinguished from {pooling} pooling"
    else:
        but = f"{pooling} pooling is better than a convolution"
    return Part(
        predicted=(
            "A convolution can represent the mean of its group, so only its training can make it worse."
            if pooling == "mean"
            else ""
        ),
        measured=f"Loss of {pooling} pooling minus that of a convolution, after "
        f"{own.iloc[0]['tokens_trained']:,.0f} tokens of training: {advantage.text(points)} nats per token.",
        verdict=beyond(advantage),
        but=but,
    )
