"""Linear attention beside linear-attention-transformer (causal) and performer-pytorch (bidirectional).

Both are given our features, and the projections are ours. The first one normalises exponentials of what it
is given as queries and keys, so it is given the logarithms of the features; what it multiplies a query by
cancels. It clamps denominators at 10⁻³ from below, which are larger here. The second one is the form without
a mask, which the first one normalises in another way.
"""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.linear_transformer import LinearTransformer, LinearTransformerConfig

pytestmark = pytest.mark.peers


def layer_of(tokens: int, chunk: int = 64) -> LinearTransformer:
    config = LinearTransformerConfig(chunk=chunk)
    layer = make_layer(LinearTransformer, config, dims_for(tokens, 2))
    assert isinstance(layer, LinearTransformer)
    return layer


def features(x: Tensor) -> Tensor:
    return F.elu(x) + 1


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 64), (40, 1), (40, 7), (100, 16), (300, 64)])
def test_equals_linear_attention_transformer(tokens: int, chunk: int) -> None:
    package = peer("linear_attention_transformer.linear_attention_transformer")
    layer, x = layer_of(tokens, chunk), numbers(2, tokens, dims_for(tokens).d_model)

    def theirs() -> Tensor:
        q, k, v = layer.projections.split(x)
        y = package.causal_linear_attn(features(q).log(), features(k).log(), v, bucket_size=1)
        return layer.projections.merge(y)

    assert_same(lambda: feed(layer, x, causal=True), theirs, [x, *layer.parameters()])


# it compares torch's version by a class that setuptools has deprecated, and calls distutils for it
@pytest.mark.filterwarnings("ignore:distutils Version classes are deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The distutils package is deprecated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_performer_pytorch_with_these_features(tokens: int, causal: bool) -> None:
    package = peer("performer_pytorch.performer_pytorch")
    layer, x = layer_of(tokens, 16), numbers(2, tokens, dims_for(tokens).d_model)

    def theirs() -> Tensor:
        q, k, v = layer.projections.split(x)
        if causal:
            y = package.causal_linear_attention_noncuda(features(q), features(k), v, chunk_size=5, eps=0.0)
        else:
            y = package.linear_attention(features(q), features(k), v)
        return layer.projections.merge(y)

    assert_same(lambda: feed(layer, x, causal=causal), theirs, [x, *layer.parameters()])
