"""Growth of activations with depth if the input of every √L-th block is stored."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import figure, finished, growth
from bench.claims.parts import exactly
from bench.report.text import units

STATEMENT = "Storing the input of every √L-th of L layers makes activations grow as √L."
SOURCE = "Chen 2016, arXiv:1604.06174, abstract and §4.1"
DEPTHS = (4, 16, 64)
"""Square numbers, so that all groups have the same size."""
CLAIMED = {"keep": 1.0, "checkpoint": 1.0, "sqrt": 0.5}
CLOSE = 0.05
"""Tolerance for the exponent of a fit."""


def held(frame: pd.DataFrame, activations: str, name: str) -> tuple[float, float, float]:
    """Return a figure at each depth."""
    keys: dict[str, Any] = {
        "variant": "dense",
        "measure": "plan",
        "objective": "clm",
        "seq_len": 1024,
        "d_model": 64,
        "batch_size": 4,
    }
    cells = [finished(frame, **keys, activations=activations, depth=depth) for depth in DEPTHS]
    for own in cells:
        if name.startswith("peak") and (own["peak_phase"] != "backward").any():
            raise Missing(
                f"activations={activations} depth={own.iloc[0]['depth']}: its peak is not in backward"
            )
    low, middle, high = (figure(own, name) for own in cells)
    return low, middle, high


def inputs(frame: pd.DataFrame) -> Judgement:
    """Judge what the forward pass stores."""
    stored = {name: growth(DEPTHS, held(frame, name, "activation_bytes")) for name in CLAIMED}
    return Judgement(
        predicted="√L inputs are stored: they grow as L^0.5; if every activation or every input is kept, as "
        "L^1.",
        measured=f"From {DEPTHS[0]} to {DEPTHS[-1]} layers, without constant parts: stored inputs grow as "
        f"L^{stored['sqrt']:.2f}; all activations L^{stored['keep']:.2f}, every block's input "
        f"L^{stored['checkpoint']:.2f}.",
        verdict=exactly(abs(stored["sqrt"] - CLAIMED["sqrt"]) <= CLOSE),
        reason=f"stored inputs grow as L^{stored['sqrt']:.2f}",
    )


def recomputed(frame: pd.DataFrame) -> Judgement:
    """Judge what the backward pass recomputes at a time."""
    again = growth(DEPTHS, held(frame, "sqrt", "peak_workspace_bytes"))
    peaks = {name: held(frame, name, "peak_bytes")[-1] for name in CLAIMED}
    deepest = DEPTHS[-1]
    group = (
        f" Here a group of {deepest**0.5:.0f} whole blocks needs more memory than the inputs that it saves."
        if peaks["checkpoint"] < peaks["sqrt"]
        else ""
    )
    return Judgement(
        predicted="The √L blocks of one group are recomputed at a time: they grow as L^0.5.",
        measured=f"Memory that is recomputed at a time grows as L^{again:.2f}. The peak of a step of "
        f"{deepest} layers is {units.size(peaks['sqrt'])}; with all activations kept "
        f"{units.size(peaks['keep'])}, with every block's input {units.size(peaks['checkpoint'])}.{group}",
        verdict=exactly(abs(again - CLAIMED["sqrt"]) <= CLOSE),
        reason=f"recomputed activations grow as L^{again:.2f}",
    )


PARTS = {
    "Stored inputs grow as √L": inputs,
    "Activations that are recomputed at a time grow as √L": recomputed,
}
