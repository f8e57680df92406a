"""Chunked attention beside transformers' Reformer's local layer with no neighbouring chunks.

Taken away: our rotary positions. Theirs wants a length that is a multiple of the chunk; with chunks
before or after, its first chunk wraps around to the last, which none of our variants does.
"""

from __future__ import annotations

import pytest
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.chunked import Chunked, ChunkedConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "chunk"), [(48, 8), (48, 1), (8, 8), (5, 8)])
def test_equals_transformers(causal: bool, tokens: int, chunk: int) -> None:
    transformers = peer("transformers")
    reformer = peer("transformers.models.reformer.modeling_reformer")
    dims = dims_for(tokens, 2)
    layer = make_layer(Chunked, ChunkedConfig(chunk=chunk), dims)
    config = transformers.ReformerConfig(
        **sizes(dims),
        attention_head_size=dims.head_dim,
        local_attn_chunk_length=chunk,
        local_num_chunks_before=0,
        local_num_chunks_after=0,
        local_attention_probs_dropout_prob=0.0,
        is_decoder=causal,
    )
    other = reformer.LocalSelfAttention(config).double()
    x = numbers(2, tokens, dims.d_model)
    qkv = layer.get_parameter("projections.qkv.weight").chunk(3)
    weights = {f"{name}.weight": w for name, w in zip(("query", "key", "value"), qkv, strict=True)}
    out = layer.get_parameter("projections.out.weight")
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: functional_call(other, weights, (x,)).hidden_states @ out.T,
        [x, *layer.parameters()],
    )
