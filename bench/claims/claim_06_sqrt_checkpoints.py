"""Growth of activations with depth if the input of every √L-th block is stored."""

from __future__ import annotations

from typing import Any

import pandas as pd

from bench.claims.base import Finding, Missing, Verdict
from bench.claims.cells import figure, finished, growth
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


def judge(frame: pd.DataFrame) -> Finding:
    """Judge the memory that the forward pass stores, and the memory that
    the backward pass recomputes at a time."""
    stored = {name: growth(DEPTHS, held(frame, name, "activation_bytes")) for name in CLAIMED}
    again = growth(DEPTHS, held(frame, "sqrt", "peak_workspace_bytes"))
    peaks = {name: held(frame, name, "peak_bytes")[-1] for name in CLAIMED}
    fits = [abs(exponent - CLAIMED["sqrt"]) <= CLOSE for exponent in (stored["sqrt"], again)]
    verdict: Verdict
    verdict, condition = ("holds" if all(fits) else "does not hold here"), ""
    if any(fits) and not all(fits):
        verdict = "holds with a condition"
        condition = (
            "for the stored activations" if fits[0] else "for the recomputed activations"
        ) + ", but not for the other part"
    deepest = DEPTHS[-1]
    group = (
        f". Here a group of {deepest**0.5:.0f} whole blocks needs more memory than the inputs that it saves"
        if peaks["checkpoint"] < peaks["sqrt"]
        else ""
    )
    return Finding(
        predicted="√L inputs are stored, and the √L blocks of one group are recomputed at a time: both "
        "parts grow as L^0.5; if every activation or every input is kept, as L^1",
        measured=f"From {DEPTHS[0]} to {deepest} layers, without constant parts: stored inputs grow as "
        f"L^{stored['sqrt']:.2f}, memory that is recomputed at a time as L^{again:.2f}; all activations "
        f"L^{stored['keep']:.2f}, every block's input L^{stored['checkpoint']:.2f}. The peak of a step "
        f"of {deepest} layers is {units.size(peaks['sqrt'])}; with all activations kept "
        f"{units.size(peaks['keep'])}, with every block's input {units.size(peaks['checkpoint'])}{group}",
        verdict=verdict,
        condition=condition,
    )
