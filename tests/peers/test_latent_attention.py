"""Latent attention beside transformers' DeepSeek-V3, projections included.

Queries are not compressed in either, and its rotary angles are given to it in float64.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.latent_attention import LatentAttention, LatentAttentionConfig
from variants.ops.projections import ROTARY_BASE, rotary_table

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tokens", [1, 33])
def test_equals_deepseek(tokens: int) -> None:
    transformers = peer("transformers")
    deepseek = peer("transformers.models.deepseek_v3.modeling_deepseek_v3")
    layer = make_layer(LatentAttention, LatentAttentionConfig(rank=6, rotary=4), dims_for(tokens, 2))
    assert isinstance(layer, LatentAttention)
    with torch.no_grad():
        layer.scale.copy_(torch.rand(6) + 0.5)
    x = numbers(2, tokens, 16)
    config = transformers.DeepseekV3Config(
        **sizes(layer.dims),
        num_key_value_heads=layer.dims.heads,
        q_lora_rank=None,
        kv_lora_rank=6,
        qk_rope_head_dim=4,
        qk_nope_head_dim=layer.dims.head_dim,
        v_head_dim=layer.dims.head_dim,
        rope_interleave=False,
        attn_implementation="eager",
    )
    other = deepseek.DeepseekV3Attention(config, 0).double()
    positions = [torch.cat([t, t], dim=-1)[None] for t in rotary_table(tokens, 4, x, ROTARY_BASE)]
    future = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    weights = {
        "q_proj.weight": layer.queries.weight,
        "kv_a_proj_with_mqa.weight": layer.down.weight,
        "kv_a_layernorm.weight": layer.scale,
        "kv_b_proj.weight": layer.up.weight,
        "o_proj.weight": layer.out.weight,
    }
    # their float64 numbers pass through a float32 softmax and a float32 norm
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: functional_call(other, weights, (x, positions, future))[0],
        [x, *layer.parameters()],
        tolerance=3e-6,
    )
