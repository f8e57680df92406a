"""Differential attention beside transformers' DiffLlama, projections included.

Its norm has no learnt scale, its rotary angles are given to it in float64, and a pair is of heads h and
h + H/2 there, so that rows of the weights are exchanged.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, feed, make_layer, numbers
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.differential import EPSILON, Differential, DifferentialConfig
from variants.base import Workload
from variants.ops.projections import ROTARY_BASE, rotary_table

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(("tokens", "index"), [(1, 0), (33, 2)])
def test_equals_diff_llama(tokens: int, index: int) -> None:
    transformers = peer("transformers")
    diff_llama = peer("transformers.models.diffllama.modeling_diffllama")
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=16, heads=4)
    layer = make_layer(Differential, DifferentialConfig(), dims, index=index)
    assert isinstance(layer, Differential)
    x = numbers(2, tokens, 16)
    config = transformers.DiffLlamaConfig(
        **sizes(dims),
        num_key_value_heads=dims.heads,
        head_dim=dims.head_dim,
        rms_norm_eps=EPSILON,
        attn_implementation="eager",
    )
    other = diff_llama.DiffLlamaAttention(config, index).double()
    positions = [torch.cat([t, t], dim=-1)[None] for t in rotary_table(tokens, dims.head_dim, x, ROTARY_BASE)]
    future = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    order = [0, 2, 1, 3]
    names = ("q_proj", "k_proj", "v_proj")
    qkv = layer.get_parameter("projections.qkv.weight").unflatten(0, (3, 4, -1))[:, order].flatten(1, 2)
    weights = {f"{name}.weight": w for name, w in zip(names, qkv, strict=True)}
    weights["o_proj.weight"] = layer.get_parameter("projections.out.weight")
    lambdas = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    weights |= dict(zip(lambdas, layer.lambdas, strict=True))
    # their float64 weights pass through a float32 softmax, and λ through float32
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: functional_call(other, weights, (x, positions, future))[0],
        [x, layer.lambdas, *layer.projections.parameters()],
        tolerance=5e-6,
    )
