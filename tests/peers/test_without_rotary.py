"""The fixture that takes rotary positions away reaches every variant that has them. It needs no package."""

from __future__ import annotations

import pytest
import torch
from oracles import EXACT, difference, dims_for, make_layer, numbers

import variants
from variants.base import Context

TOKENS = 40
NAMES = [name for name in variants.mixers() if variants.load(name).position_scheme == "rotary"]


def spread_changes(name: str) -> float:
    """By how much outputs change where the distances between tokens are three times as large."""
    variant = variants.load(name)
    config = variant.Config()
    causal = variant.no_form(config, causal=True) is None
    layer = make_layer(variant, config, dims_for(TOKENS)).eval()
    x = numbers(1, TOKENS, layer.dims.d_model)

    def outputs(positions: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return layer(x, Context(causal=causal, positions=positions)).y.detach()

    return difference(outputs(3 * torch.arange(TOKENS)), outputs(torch.arange(TOKENS)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("without_rotary")
def test_no_variant_has_positions(name: str) -> None:
    assert spread_changes(name) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_positions_without_the_fixture(name: str) -> None:
    """Or the test above would find nothing wherever `rotary` came from."""
    assert spread_changes(name) > EXACT
