"""Dense attention beside transformers' Llama: rotary positions, causal mask and projections included.

Nothing is taken away but their float32 angles, which are given to them in float64.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.dense import Dense, DenseConfig
from variants.ops.projections import ROTARY_BASE

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tokens", [1, 33])
def test_equals_llama(tokens: int) -> None:
    transformers = peer("transformers")
    llama = peer("transformers.models.llama.modeling_llama")
    dims = dims_for(tokens, 2)
    layer = make_layer(Dense, DenseConfig(), dims)
    config = transformers.LlamaConfig(
        **sizes(dims),
        num_key_value_heads=dims.heads,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        attn_implementation="eager",
    )
    other = llama.LlamaAttention(config, 0).double()
    channel = torch.arange(0, dims.head_dim, 2, dtype=torch.float64)
    angle = torch.arange(tokens)[:, None] * ROTARY_BASE ** (-channel / dims.head_dim)
    positions = [f(torch.cat([angle, angle], dim=-1))[None] for f in (torch.cos, torch.sin)]
    future = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    x = numbers(2, tokens, dims.d_model)

    names = ("q_proj", "k_proj", "v_proj")
    qkv = layer.get_parameter("projections.qkv.weight")
    weights = {f"{name}.weight": w for name, w in zip(names, qkv.chunk(3), strict=True)}
    weights["o_proj.weight"] = layer.get_parameter("projections.out.weight")
    # their float64 weights pass through a float32 softmax
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: functional_call(other, weights, (x, positions, future))[0],
        [x, *layer.parameters()],
        tolerance=2e-6,
    )

    theirs = llama.LlamaRotaryEmbedding(config)(x.float(), torch.arange(tokens)[None])
    for float32, float64 in zip(theirs, positions, strict=True):
        torch.testing.assert_close(float32.double(), float64, atol=2e-6, rtol=0)
