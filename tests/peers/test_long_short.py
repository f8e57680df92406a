"""Long-short attention beside long-short-transformer, bidirectional, with one head.

Taken away: positions, on both sides; their biases. Theirs has one projection for keys and values, normalises
each head by itself (so there is one), projects the keys where ours projects the tokens, and divides the
sequence into windows (so there is one). Causally theirs differs: the last token of a segment reads the rows
of that segment.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers

from peers import peer
from variants.attention.long_short import LongShort, LongShortConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


@pytest.mark.parametrize(("tokens", "rank"), [(40, 4), (21, 1), (5, 8)])
def test_equals_long_short_transformer(tokens: int, rank: int) -> None:
    package = peer("long_short_transformer.long_short_transformer")
    dims = replace(dims_for(tokens, 2), heads=1)
    width = dims.d_model
    layer = make_layer(LongShort, LongShortConfig(window=tokens, rank=rank), dims)
    assert isinstance(layer, LongShort)
    other = package.LongShortAttention(
        dim=width, heads=1, dim_head=width, causal=False, window_size=tokens, r=rank
    ).double()
    other.pos_emb = None
    with torch.no_grad():
        w_q, w_k, w_v = layer.projections.qkv.weight.chunk(3)
        w_v.copy_(w_k)
        for norm, theirs in ((layer.window_norm, other.local_norm), (layer.row_norm, other.global_norm)):
            norm.weight.copy_(1 + 0.1 * numbers(width))
            theirs.weight.copy_(norm.weight)
        layer.dynamic.weight.copy_(other.to_dynamic_proj.weight @ w_k)
        other.to_q.weight.copy_(w_q)
        other.to_kv.weight.copy_(w_k)
        other.to_out.weight.copy_(layer.projections.out.weight)
        other.to_out.bias.zero_()
    x = numbers(2, tokens, width)
    assert_same(lambda: feed(layer, x, causal=False), lambda: other(x), [x])
