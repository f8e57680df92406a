"""Memory-compressed attention beside memory-compressed-attention.

Taken away: our rotary positions, its biases and its learnt null key. Its scores are divided by √C, so it is
given queries that are √H times as large. Causally, its token reads the pool that it completes itself, and
those tokens are not compared. It puts the tokens that an incomplete pool lacks before the sequence: it is
compared with the mirror image.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer
from variants.attention.memory_compressed import MemoryCompressed, MemoryCompressedConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


def layer_of(tokens: int, rate: int) -> MemoryCompressed:
    layer = make_layer(MemoryCompressed, MemoryCompressedConfig(rate=rate), dims_for(tokens, 2))
    assert isinstance(layer, MemoryCompressed)
    return layer


def theirs(layer: MemoryCompressed, x: Tensor, *, causal: bool, mirrored: bool) -> Tensor:
    """Their outputs with our weights. `mirrored`: the last tap of the convolution is the first."""
    dims, rate = layer.dims, layer.config.rate
    package = peer("memory_compressed_attention.memory_compressed_attention")
    other = package.MemoryCompressedAttention(
        dims.d_model, heads=dims.heads, causal=causal, compression_factor=rate
    ).double()
    q, k, v = layer.projections.qkv.weight.chunk(3)
    taps = layer.kernels[0].unflatten(1, (rate, -1))  # (H, s, D, D)
    taps = taps.flip(1) if mirrored else taps
    weights = {
        "to_qkv.weight": torch.cat([q * dims.heads**0.5, k, v]),
        "compress_fn.conv.weight": taps.permute(0, 3, 2, 1).flatten(0, 1),
        "compress_fn.conv.bias": x.new_zeros(dims.d_model),
        "to_out.weight": layer.projections.out.weight,
        "to_out.bias": x.new_zeros(dims.d_model),
        "null_k": x.new_zeros(1, 1, dims.d_model),
        "null_v": layer.null_value.view(1, 1, -1),
    }
    y: Tensor = functional_call(other, weights, (x.flip(1) if mirrored else x,))
    return y.flip(1) if mirrored else y


@pytest.mark.parametrize(
    ("tokens", "rate"), [(1, 1), (1, 3), (39, 3), (40, 3), (41, 3), (2, 5), (64, 1), (300, 7)]
)
def test_equals_the_package(tokens: int, rate: int) -> None:
    layer, x = layer_of(tokens, rate), numbers(2, tokens, dims_for(tokens).d_model)
    with torch.no_grad():
        layer.null_value += torch.linspace(-1, 1, layer.null_value.numel()).view_as(layer.null_value)
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: theirs(layer, x, causal=False, mirrored=True),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize(("tokens", "rate"), [(2, 2), (39, 3), (40, 4), (301, 7)])
def test_equals_the_package_where_a_token_completes_no_pool(tokens: int, rate: int) -> None:
    layer, x = layer_of(tokens, rate), numbers(2, tokens, dims_for(tokens).d_model)
    with torch.no_grad():
        layer.null_value += torch.linspace(-1, 1, layer.null_value.numel()).view_as(layer.null_value)
    open_pools = torch.arange(tokens) % rate != rate - 1
    assert_same(
        lambda: feed(layer, x, causal=True)[:, open_pools],
        lambda: theirs(layer, x, causal=True, mirrored=False)[:, open_pools],
        [x, *layer.parameters()],
    )
