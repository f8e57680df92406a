"""Routing by content against random clusters and against windows, at equal FLOPs.

`routing` with `selection=random` draws the cluster of a token from its position; everything else is equal.
"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement, Missing
from bench.claims.cells import figure
from bench.claims.losses import better, knobs_that, pair, trained
from bench.claims.parts import one_setting
from bench.report.text import units

STATEMENT = "Routing by content is better than random clusters and than windows alone, at equal FLOPs."
SOURCE = (
    "Roy 2020, arXiv:2003.05997, Table 1 (Random Transformer and local attention, on images); hashing by "
    "content: Kitaev 2020, arXiv:2001.04451, §2"
)
EQUAL = 0.1
"""Relative difference of a step's FLOPs up to which they are *equal*. Choosing clusters costs little."""


def _routed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the trained models that route by content without a leak, of one setting."""
    rows = trained(frame, "routing")
    return one_setting(knobs_that(rows, lambda p: p["selection"] in ("auto", "nearest"), "selection=nearest"))


def _compared(own: pd.DataFrame, other: pd.DataFrame, name: str) -> Judgement:
    own, other = pair(own, other)
    flops = figure(own, "flops_algorithmic_step") / figure(other, "flops_algorithmic_step")
    if abs(flops - 1) > EQUAL:
        raise Missing(
            f"variant=routing and {name} at equal FLOPs; a step has {units.ratio(flops)} those of {name}"
        )
    return better(
        own,
        other,
        ("routing by content", name),
        f"None: a step has {units.ratio(flops)} the FLOPs of {name}; only the choice of the pairs differs.",
    )


def than_random(frame: pd.DataFrame) -> Judgement:
    """Judge routing by content against random clusters."""
    own = _routed(frame)
    knobs = {key: value for key, value in own.iloc[0]["variant_params"].items() if key != "selection"}
    other = knobs_that(
        trained(frame, "routing"),
        lambda params: params["selection"] == "random" and all(params[key] == knobs[key] for key in knobs),
        "selection=random",
    )
    return _compared(own, other, "random clusters")


def than_windows(frame: pd.DataFrame) -> Judgement:
    """Judge routing by content against the window whose step is nearest in FLOPs."""
    own = _routed(frame)
    windows = trained(frame, "longformer")
    windows = pair(own, windows)[1]
    apart = (windows["flops_algorithmic_step"] / figure(own, "flops_algorithmic_step") - 1).abs()
    nearest = windows[(apart == apart.min()).to_numpy()].iloc[0]["params_json"]
    other = windows[windows["params_json"] == nearest]
    return _compared(own, other, f"windows of {other.iloc[0]['variant_params']['window'][0]}")


PARTS = {
    "Routing by content is better than random clusters": than_random,
    "Routing by content is better than windows alone": than_windows,
}
