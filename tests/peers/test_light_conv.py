"""Lightweight and dynamic convolutions beside those of espnet, which are after fairseq's, the authors'.

Taken away: its biases. Its number of taps is odd and its window is centred; causally it masks the taps after
the middle. Its light convolution shares taps among every H-th channel, so its channels are in another order.
Its dynamic convolution gives no weight to the zeros around a sequence; tokens that read some are left out.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.dynamic_conv import DynamicConv, DynamicConvConfig
from variants.attention.light_conv import LightConv, LightConvConfig

pytestmark = pytest.mark.peers

SIZES = [(40, 5), (67, 31), (130, 3), (40, 1)]


def taps_of(theirs: int, *, causal: bool) -> int:
    """How many of their taps are not masked."""
    return theirs // 2 + 1 if causal else theirs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "taps"), [(1, 3), (3, 31), *SIZES])
def test_equals_the_light_convolution_of_espnet(tokens: int, taps: int, causal: bool) -> None:
    module = peer("espnet.nets.pytorch_backend.transformer.lightconv")
    dims = dims_for(tokens, 2)
    layer = make_layer(LightConv, LightConvConfig(kernel=(taps_of(taps, causal=causal),)), dims)
    assert isinstance(layer, LightConv)
    other = module.LightweightConvolution(dims.heads, dims.d_model, 0.0, taps, use_kernel_mask=causal)
    other = other.double()
    channel = torch.arange(dims.d_model).view(dims.heads, -1).T.flatten()  # theirs: head by head is ours
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        masked = x.new_zeros(dims.heads, taps - layer.kernel)
        weights = {
            "linear1.weight": layer.input.weight[torch.cat([channel, channel + dims.d_model])],
            "linear1.bias": x.new_zeros(2 * dims.d_model),
            "weight": torch.cat([layer.taps, masked], dim=1)[:, None],
            "linear2.weight": layer.out.weight[:, channel],
            "linear2.bias": x.new_zeros(dims.d_model),
        }
        y: Tensor = functional_call(other, weights, (x, x, x, None))
        return y

    assert_same(lambda: feed(layer, x, causal=causal), theirs, [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "taps"), SIZES)
def test_equals_the_dynamic_convolution_of_espnet(tokens: int, taps: int, causal: bool) -> None:
    module = peer("espnet.nets.pytorch_backend.transformer.dynamic_conv")
    dims = dims_for(tokens, 2)
    layer = make_layer(DynamicConv, DynamicConvConfig(kernel=(taps_of(taps, causal=causal),)), dims)
    assert isinstance(layer, DynamicConv)
    other = module.DynamicConvolution(dims.heads, dims.d_model, 0.0, taps, use_kernel_mask=causal)
    other = other.double()
    whole = slice(taps // 2, tokens if causal else tokens - taps // 2)
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        logits = layer.taps.weight.view(dims.heads, layer.kernel, -1)
        masked = logits.new_zeros(dims.heads, taps - layer.kernel, dims.d_model)
        weights = {
            "linear1.weight": layer.input.weight,
            "linear1.bias": x.new_zeros(2 * dims.d_model),
            "linear_weight.weight": torch.cat([logits, masked], dim=1).flatten(0, 1),
            "linear_weight.bias": x.new_zeros(dims.heads * taps),
            "linear2.weight": layer.out.weight,
            "linear2.bias": x.new_zeros(dims.d_model),
        }
        y: Tensor = functional_call(other, weights, (x, x, x, None))
        return y[:, whole]

    assert_same(lambda: feed(layer, x, causal=causal)[:, whole], theirs, [x, *layer.parameters()])
