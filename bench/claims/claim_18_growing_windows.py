"""Windows that grow from layer to layer, and dilation in the higher layers, at equal numbers of pairs.

Dilation is that of the paper's language models: some heads of the higher layers only. It is a mixture of
layers (`variant=hybrid`), because the knob `dilation` of a layer holds for all layers.
"""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise

import pandas as pd

from bench.claims.base import Judgement
from bench.claims.losses import better, in_setting_of, knobs_that, trained
from bench.claims.parts import one_setting

STATEMENT = (
    "Windows that grow with the layers are better than equal ones, shrinking ones are worse, and dilation of "
    "some heads helps."
)
SOURCE = (
    "Beltagy 2020, arXiv:2004.05150, §4.1 and Table 4 (§4.2.2); the authors note that the order may be "
    "another one after more training"
)
_WINDOW = re.compile(r"longformer\(window=(\d+)(,dilation=.*)?\)")


def _growing(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the trained models whose windows increase with every layer, of one setting."""
    rows = knobs_that(
        trained(frame, "longformer"), lambda params: _increases(params["window"]), "growing window"
    )
    rows = one_setting(rows)
    first = json.loads(rows.iloc[0]["params_json"])["window"]
    return knobs_that(rows, lambda params: params["window"] == first, f"window={first}")


def _increases(windows: list[int]) -> bool:
    return len(windows) > 1 and all(a < b for a, b in pairwise(windows))


def arranged(frame: pd.DataFrame, shape: str) -> Judgement:
    """Judge growing windows against shrinking ones, or against equal ones of the same mean."""
    own = _growing(frame)
    windows = list(own.iloc[0]["variant_params"]["window"])
    mean = sum(windows) // len(windows)
    wanted = windows[::-1] if shape == "shrinking" else [mean]
    other = knobs_that(
        trained(frame, "longformer"), lambda params: params["window"] == wanted, f"window={wanted}"
    )
    return better(
        own,
        other,
        (f"windows {windows}", f"windows {wanted}"),
        "None: the windows have the same sum, so they read as many pairs; only their order differs.",
    )


def dilated(frame: pd.DataFrame) -> Judgement:
    """Judge dilation of some heads in higher layers against the same windows without."""
    own = trained(frame, "hybrid")
    plain = _growing(frame)
    windows = list(plain.iloc[0]["variant_params"]["window"])
    own = knobs_that(
        own,
        lambda params: (
            _windows(params["layers"]) == windows and any("dilation" in t for t in params["layers"])
        ),
        f"longformer layers with dilation and windows {windows}",
    )
    return better(
        own,
        in_setting_of(plain, one_setting(own)),
        ("dilated heads", "no dilation"),
        "None: a dilated window reads as many pairs, twice as far.",
    )


def _windows(layers: list[str]) -> list[int] | None:
    """Return the windows of a mixture's layers; None if one is no window."""
    found = [_WINDOW.fullmatch(text) for text in layers]
    return [int(match[1]) for match in found if match] if all(found) else None


PARTS = {
    "Growing windows are better than shrinking ones": partial(arranged, shape="shrinking"),
    "Growing windows are better than equal ones": partial(arranged, shape="equal"),
    "Dilation of some heads in the higher layers helps": dilated,
}
