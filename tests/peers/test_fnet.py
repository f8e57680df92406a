"""FNet beside the layer of transformers, which has no scale."""

from __future__ import annotations

import pytest
from oracles import assert_same, dims_for, feed, make_layer, numbers

from peers import peer
from variants.attention.fnet import Fnet, FnetConfig

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("tokens", [1, 31, 64])
def test_equals_the_layer_of_transformers(tokens: int) -> None:
    modeling = peer("transformers.models.fnet.modeling_fnet")
    dims = dims_for(tokens, 2)
    config = modeling.FNetConfig(hidden_size=dims.d_model, use_tpu_fourier_optimizations=False)
    other = modeling.FNetBasicFourierTransform(config)
    layer, x = make_layer(Fnet, FnetConfig(norm="none"), dims), numbers(2, tokens, dims.d_model)
    assert_same(lambda: feed(layer, x, causal=False), lambda: other(x)[0], [x])
