"""Lightning attention beside the layer of MiniMax-01 in transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor

from peers import peer, sizes
from variants.attention.lightning import Lightning, LightningConfig
from variants.base import Context

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("tokens", "index"), [(1, 0), (40, 0), (40, 1), (100, 2)])
def test_equals_the_layer_of_transformers(tokens: int, index: int) -> None:
    """Their projection has query, key and value of a head side by side. Their decays are float32, and their
    norm has the ε of ours."""
    package = peer("transformers.models.minimax.modeling_minimax")
    layer = make_layer(Lightning, LightningConfig(chunk=16, decay_layers=4), dims_for(tokens, 2), index=index)
    assert isinstance(layer, Lightning)
    config = package.MiniMaxConfig(
        **sizes(layer.dims),
        num_hidden_layers=4,
        num_key_value_heads=2,
        block_size=32,
        layer_types=["linear_attention"] * 4,
    )
    other = package.MiniMaxLightningAttention(config, index).double()
    other.norm.variance_epsilon = 1e-5
    ours = layer.projections.qkv.weight.detach().unflatten(0, (3, 2, -1))
    with torch.no_grad():
        assert layer.scale is not None
        layer.scale.copy_(numbers(16, seed=5))
        other.qkv_proj.weight.copy_(ours.transpose(0, 1).flatten(0, 2))
        other.out_proj.weight.copy_(layer.projections.out.weight)
        other.output_gate.weight.copy_(layer.gate.weight)
        other.norm.weight.copy_(layer.scale)
    x = numbers(2, tokens, 16)

    def theirs() -> Tensor:
        found: Tensor = other(x, None, None)[0]
        return found

    pairs = [
        (x, x),
        (layer.projections.out.weight, other.out_proj.weight),
        (layer.gate.weight, other.output_gate.weight),
        (layer.scale, other.norm.weight),
    ]
    got, want = zip(*pairs, strict=True)
    assert_same(lambda: layer(x, Context(causal=True)).y, theirs, got, want, tolerance=1e-5)
