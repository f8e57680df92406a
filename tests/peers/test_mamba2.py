"""Mamba-2 beside the mixer of transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.mamba2 import Mamba2, Mamba2Config
from variants.base import Context

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_equals_the_mixer_of_transformers(tokens: int, groups: int) -> None:
    """They compute decays and sums in float32. With two groups
    their norm has two parts, so it is ours here."""
    package = peer("transformers.models.mamba2.modeling_mamba2")
    config = Mamba2Config(expand=2, state=6, groups=groups, chunk=16)
    layer = make_layer(Mamba2, config, dims_for(tokens, 2))
    assert isinstance(layer, Mamba2)
    sizes = {"num_heads": 4, "head_dim": 8, "hidden_size": 16, "state_size": 6, "expand": 2}
    theirs_config = package.Mamba2Config(
        **sizes, n_groups=groups, conv_kernel=4, chunk_size=16, num_hidden_layers=1, layer_norm_epsilon=1e-5
    )
    other = package.Mamba2Mixer(theirs_config, 0).double().eval()
    other.norm.group_size = 32
    pairs = [
        (layer.input.weight, other.in_proj.weight),
        (layer.filter_bias, other.conv1d.bias),
        (layer.step_bias, other.dt_bias),
        (layer.rate, other.A_log),
        (layer.skip, other.D),
        (layer.scale, other.norm.weight),
        (layer.out.weight, other.out_proj.weight),
    ]
    with torch.no_grad():
        layer.scale.copy_(numbers(32, seed=5))
        layer.skip.copy_(numbers(4, seed=6))
        for ours, copy in pairs:
            copy.copy_(ours)
        other.conv1d.weight.copy_(layer.filters[:, None])
    x = numbers(2, tokens, 16)

    def theirs() -> Tensor:
        found: Tensor = other(x)
        return found

    got, want = zip((x, x), *pairs, strict=True)
    assert_same(lambda: layer(x, Context(causal=True)).y, theirs, got, want, tolerance=1e-4)
