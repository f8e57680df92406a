"""An accelerator is given few launches a layer, however long the sequence.

Below some hundred launches a layer the host keeps up with an accelerator; above, a step takes the host's time
whatever the variant computes. A mark says what a variant launches that is over a ceiling today; mending the
variant turns its test red until the mark is removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

import variants
from bench import CONFIGS
from bench.tools.launches import accelerator_spec, launches_a_layer, plan

SHORT, LONG, LONGEST = 4096, 16384, 65536
A_DOUBLING = 8
"""Launches that a layer may add where the length doubles: a step more of a tree, forward and backward."""
CEILING = 300
"""Launches a layer at the longest length."""
ON_AN_ACCELERATOR: dict[str, dict[str, Any]] = {
    name: {"segments_at_once": "all"} for name in ("compressive", "transformer_xl")
}
"""Knobs that the presets for GPUs set. With one segment at a time, which holds the activations of one,
launches grow with the length."""
ABOVE = {
    "block_recurrent": 28_110,
    "delta_net": 340,
    "dsa": 3_934,
    "entmax": 55_894,
    "forgetting": 4_867,
    "gated_delta_net": 444,
    "gla": 376,
    "kda": 675,
    "landmark": 375,
    "mamba2": 319,
    "nsa": 1_269,
    "routing": 499,
}
"""Variant → launches a layer at the longest length."""
GROW = {
    "block_recurrent": "grow with T: the state of a block is computed from that of the block before",
    "entmax": "grow with T²: all scores are computed, in pieces that bound the memory",
    "forgetting": "grow with T: all scores are computed, in rows that bound the memory",
    "nsa": "grow with T: scores of compressed keys are computed, in pieces that bound the memory",
}
FLASH = ("longformer", "routing", "sparse_fixed", "sparse_strided")
"""Variants with an implementation by flash attention."""
FIRST = ("dense", "longformer", "routing")
"""Variants of the short tier."""


@cache
def launches(name: str, seq_len: int, impl: str | None = None) -> int:
    params = {"impl": impl} if impl else ON_AN_ACCELERATOR.get(name, {})
    return launches_a_layer(plan(accelerator_spec(name, seq_len, depth=2, params=params)))


def cases(over: Mapping[str, object]) -> list[Any]:
    """All variants; those over the ceiling must fail."""
    found = []
    for name in variants.mixers():
        marks: list[pytest.MarkDecorator] = [] if name in FIRST else [pytest.mark.slow]
        if name in over:
            marks.append(pytest.mark.xfail(strict=True, reason=f"launches a layer: {over[name]}"))
        found.append(pytest.param(name, marks=marks))
    return found


@pytest.mark.parametrize("name", cases(GROW))
def test_launches_grow_with_the_logarithm_of_the_length_at_most(name: str) -> None:
    allowed = A_DOUBLING * math.log2(LONG / SHORT)
    assert launches(name, LONG) <= launches(name, SHORT) + allowed


def test_the_presets_for_gpus_set_these_knobs() -> None:
    for preset in ("gpu", "gpu_long"):
        text = (CONFIGS / "experiment" / f"{preset}.yaml").read_text()
        blocks = [block for block in text.split("\n      - ") if "variant: transformer_xl" in block]
        assert blocks
        assert all("segments_at_once: all" in block for block in blocks), preset


@pytest.mark.parametrize("name", cases(ABOVE))
def test_a_layer_stays_below_the_ceiling(name: str) -> None:
    assert launches(name, LONGEST) <= CEILING


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_stays_below_the_ceiling_at_any_length(name: str) -> None:
    assert launches(name, SHORT, "flash") == launches(name, LONGEST, "flash") <= CEILING


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_moves_no_scores(name: str) -> None:
    """A step moves at most half as much again as one of dense attention, whose kernel stores none either."""
    cells = (
        accelerator_spec("dense", LONGEST, depth=2),
        accelerator_spec(name, LONGEST, depth=2, params={"impl": "flash"}),
    )
    dense, flash = (plan(cell).figures.bytes_moved_step for cell in cells)
    assert flash <= 1.5 * dense
