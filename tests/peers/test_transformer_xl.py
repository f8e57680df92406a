"""Transformer-XL beside XLNet's relative attention in transformers, which holds the same four-term score.

Taken away: their residual connection and layer norm, by adding them to ours. Their sinusoids are float32
and are compared by themselves; both read ours.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.transformer_xl import TransformerXL, TransformerXLConfig
from variants.ops.segments.relative_attention import sinusoids

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("tokens", "segment", "mem_len"), [(1, 4, 4), (20, 20, 0), (23, 7, 5), (40, 10, 30), (300, 150, 20)]
)
def test_equals_xlnet(tokens: int, segment: int, mem_len: int) -> None:
    transformers = peer("transformers")
    xlnet = peer("transformers.models.xlnet.modeling_xlnet")
    dims = dims_for(tokens, 2)
    layer = make_layer(TransformerXL, TransformerXLConfig(segment=segment, mem_len=mem_len), dims)
    assert isinstance(layer, TransformerXL)
    config = transformers.XLNetConfig(
        d_model=dims.d_model, n_head=dims.heads, dropout=0.0, layer_norm_eps=1e-5, attn_type="uni"
    )
    other = xlnet.XLNetRelativeAttention(config).double()
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        split = (dims.heads, dims.head_dim)
        key, value = layer.kv.weight.chunk(2)
        matrices = {"q": layer.q.weight, "k": key, "v": value, "r": layer.r.weight}
        weights = {name: w.T.unflatten(1, split) for name, w in matrices.items()}
        weights |= {"o": layer.out.weight.unflatten(1, split), "r_w_bias": layer.u, "r_r_bias": layer.v}
        memory, outputs = x[:, :0], []
        for h in x.split(segment, dim=1):
            keys = memory.shape[1] + h.shape[1]
            later = torch.ones(h.shape[1], keys, dtype=x.dtype).triu(1 + memory.shape[1])
            r = sinusoids(keys, dims.d_model, x)[:, None]  # (J + 1, 1, C)
            mask = later[:, :, None, None]
            given = h.transpose(0, 1), None, mask, None, r, None, memory.transpose(0, 1)
            outputs.append(functional_call(other, weights, given)[0].transpose(0, 1))
            memory = torch.cat([memory, h], dim=1)[:, max(0, keys - mem_len) :].detach()
        return torch.cat(outputs, dim=1)

    assert_same(
        lambda: F.layer_norm(x + feed(layer, x, causal=True), x.shape[-1:]),
        theirs,
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("keys", [1, 60])
def test_sinusoids_are_those_of_xlnet(keys: int) -> None:
    transformers = peer("transformers")
    config = transformers.XLNetConfig(d_model=16, n_head=2, n_layer=1, vocab_size=8, attn_type="uni")
    theirs = transformers.XLNetModel(config).relative_positional_encoding(keys, keys)[:, 0]
    ours = sinusoids(keys, 16, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(theirs.double(), ours, atol=1e-5, rtol=0)
