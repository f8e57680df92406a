"""Kimi Delta Attention beside that of transformers, with the same weights.

Theirs computes the rule in float32, and its rank is the width of a head.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.kda import Kda, KdaConfig
from variants.base import Context
from variants.ops.recurrences.delta_mixer import EPSILON

pytestmark = pytest.mark.peers
FLOAT32 = 1e-5


def weights_of(layer: Kda) -> dict[str, Tensor]:
    """Ours by their names."""
    q, k, v = layer.projections.qkv.weight.chunk(3)
    assert layer.taps is not None
    return {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "conv1d.weight": layer.taps[:, None],
        "forget_gate.f_a_proj.weight": layer.get_parameter("decay.0.weight"),
        "forget_gate.f_b_proj.weight": layer.get_parameter("decay.1.weight"),
        "forget_gate.dt_bias": layer.rates.bias,
        "forget_gate.A_log": layer.rates.log_rates.view(1, 1, -1, 1),
        "b_proj.weight": layer.strength.weight,
        "g_a_proj.weight": layer.get_parameter("output_gate.0.weight"),
        "g_b_proj.weight": layer.get_parameter("output_gate.1.weight"),
        "o_norm.weight": layer.scale,
        "o_proj.weight": layer.projections.out.weight,
    }


@pytest.mark.parametrize("tokens", [1, 50, 130])
def test_equals_transformers(tokens: int) -> None:
    transformers = peer("transformers")
    module = peer("transformers.models.kimi_linear.modeling_kimi_linear")
    dims = dims_for(tokens, 2)
    layer = make_layer(Kda, KdaConfig(rank=dims.head_dim), dims).float()
    assert isinstance(layer, Kda)
    with torch.no_grad():
        layer.scale.normal_()
        layer.rates.log_rates.normal_()
    settings = transformers.KimiLinearConfig(
        hidden_size=dims.d_model,
        linear_num_heads=dims.heads,
        linear_head_dim=dims.head_dim,
        linear_conv_kernel_dim=layer.config.conv,
        rms_norm_eps=EPSILON,
        layer_types=["linear_attention"],
        num_hidden_layers=1,
    )
    other = module.KimiLinearDeltaAttention(settings, 0)
    x = numbers(2, tokens, dims.d_model).detach().float().requires_grad_()
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: functional_call(other, weights_of(layer), (x,)),
        [x, *layer.parameters()],
        tolerance=FLOAT32,
    )
