"""One dense layer among windows: is the mixture as good as dense attention in every layer?"""

from __future__ import annotations

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.losses import Params, better, knobs_that, near, pair, trained
from bench.claims.parts import one_setting

STATEMENT = "One dense layer in k is nearly as good as dense attention in every layer, and better than none."
SOURCE = (
    "Gemma Team 2025, arXiv:2503.19786, §5.2 and Figure 3 (windows and dense layers, up to 7:1); Lieber "
    "2024, arXiv:2403.19887, §6.1 (one attention layer in eight, among layers of a state-space model)"
)


def _is_mixture(params: Params) -> bool:
    layers = list(params["layers"])
    others = {text for text in layers if text != "dense"}
    return len(others) == 1 and min(others).startswith("longformer") and layers.count("dense") == 1


def _cells(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, str, str]:
    """Return the mixture and its windows alone, in one setting, with their names."""
    own = one_setting(knobs_that(trained(frame, "hybrid"), _is_mixture, "with one dense layer among windows"))
    layers = list(own.iloc[0]["variant_params"]["layers"])
    own = knobs_that(own, lambda params: list(params["layers"]) == layers, f"layers={layers}")
    text = next(text for text in layers if text != "dense")
    window = [int(text.removeprefix("longformer(window=").removesuffix(")"))]
    alone = knobs_that(
        trained(frame, "longformer"), lambda params: params["window"] == window, f"window={window}"
    )
    return (*pair(own, alone), f"one dense layer in {len(layers)}", f"windows of {window[0]} alone")


def as_dense(frame: pd.DataFrame) -> Judgement:
    """Judge the mixture against dense attention; windows alone must lose something to it."""
    own, alone, mixture, windows = _cells(frame)
    return near(
        own,
        trained(frame, "dense"),
        alone,
        (mixture, "dense attention", windows),
        "One dense layer can read any earlier token, and later layers pass on what it read.",
    )


def than_windows(frame: pd.DataFrame) -> Judgement:
    """Judge the mixture against its windows alone."""
    own, alone, mixture, windows = _cells(frame)
    return better(own, alone, (mixture, windows), "Only the mixture reads tokens beyond the windows.")


PARTS = {
    "The loss of the mixture is near that of dense attention": as_dense,
    "The loss of the mixture is below that of windows alone": than_windows,
}
