"""Gated DeltaNet beside that of Qwen3-Next in transformers, with the same weights.

Theirs computes the rule in float32.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from variants.base import Context
from variants.ops.recurrences.delta_mixer import EPSILON

pytestmark = pytest.mark.peers
FLOAT32 = 1e-5


def weights_of(layer: GatedDeltaNet) -> dict[str, Tensor]:
    """Ours by their names: rows of all projections of a head are neighbours."""
    heads = layer.dims.heads
    maps = [*layer.projections.qkv.weight.chunk(3), layer.output_gate.weight]
    by_head = torch.cat([w.unflatten(0, (heads, -1)) for w in maps], 1)
    assert layer.taps is not None
    return {
        "in_proj_qkvz.weight": by_head.flatten(0, 1),
        "in_proj_ba.weight": torch.stack([layer.strength.weight, layer.decay.weight], 1).flatten(0, 1),
        "conv1d.weight": layer.taps[:, None],
        "dt_bias": layer.rates.bias,
        "A_log": layer.rates.log_rates,
        "norm.weight": layer.scale,
        "out_proj.weight": layer.projections.out.weight,
    }


@pytest.mark.parametrize("tokens", [1, 50, 130])
def test_equals_transformers(tokens: int) -> None:
    transformers = peer("transformers")
    module = peer("transformers.models.qwen3_next.modeling_qwen3_next")
    dims = dims_for(tokens, 2)
    layer = make_layer(GatedDeltaNet, GatedDeltaNetConfig(), dims).float()
    assert isinstance(layer, GatedDeltaNet)
    with torch.no_grad():
        layer.scale.normal_()
        layer.rates.log_rates.normal_()
    settings = transformers.Qwen3NextConfig(
        hidden_size=dims.d_model,
        linear_num_key_heads=dims.heads,
        linear_num_value_heads=dims.heads,
        linear_key_head_dim=dims.head_dim,
        linear_value_head_dim=dims.head_dim,
        linear_conv_kernel_dim=layer.config.conv,
        rms_norm_eps=EPSILON,
        layer_types=["linear_attention"],
        num_hidden_layers=1,
    )
    other = module.Qwen3NextGatedDeltaNet(settings, 0)
    x = numbers(2, tokens, dims.d_model).detach().float().requires_grad_()
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: functional_call(other, weights_of(layer), (x,)),
        [x, *layer.parameters()],
        tolerance=FLOAT32,
    )
