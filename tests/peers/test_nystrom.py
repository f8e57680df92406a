"""Nyström attention beside transformers' Nyströmformer and the package nystrom-attention. Taken away: our
rotary positions, their biases.

In transformers, the default start of the iteration divides by the largest norm of all sequences and heads. It
is compared with its other start, which like ours is that of each matrix. It wants a length that is a multiple
of the landmarks, and always has a convolution.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.nystrom import Nystrom, NystromConfig
from variants.base import Dims

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


@pytest.mark.parametrize("conv", [5, 33])
@pytest.mark.parametrize(("tokens", "landmarks"), [(40, 8), (40, 20), (300, 12)])
def test_equals_transformers(tokens: int, landmarks: int, conv: int) -> None:
    module = peer("transformers.models.nystromformer.modeling_nystromformer")
    dims = dims_for(tokens, 2)
    layer = make_layer(Nystrom, NystromConfig(landmarks=landmarks, conv=conv), dims)
    config = peer("transformers").NystromformerConfig(
        **sizes(dims),
        num_landmarks=landmarks,
        segment_means_seq_len=tokens,
        conv_kernel_size=conv,
        attention_probs_dropout_prob=0.0,
    )
    other = module.NystromformerSelfAttention(config).double()
    other.init_option = "of each matrix"
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        weights = {name: torch.zeros_like(p) for name, p in other.named_parameters() if "bias" in name}
        qkv = layer.get_parameter("projections.qkv.weight").chunk(3)
        names = ("query", "key", "value")
        weights |= {f"{name}.weight": weight for name, weight in zip(names, qkv, strict=True)}
        weights["conv.weight"] = layer.get_parameter("filters")[:, None, :, None]
        (y,) = functional_call(other, weights, (x,))
        merged: Tensor = y @ layer.get_parameter("projections.out.weight").T
        return merged

    assert_same(lambda: feed(layer, x, causal=False), theirs, [x, *layer.parameters()])


@pytest.mark.parametrize("conv", [0, 33])
@pytest.mark.parametrize(("tokens", "landmarks"), [(40, 8), (96, 16)])
def test_equals_the_package_nystrom_attention(tokens: int, landmarks: int, conv: int) -> None:
    """Its iteration starts from the largest norm of all sequences and heads: here there is one of each."""
    package = peer("nystrom_attention")
    dims = Dims(seq_len=tokens, d_model=16, heads=1)
    layer = make_layer(Nystrom, NystromConfig(landmarks=landmarks, conv=conv), dims)
    other = package.NystromAttention(
        dim=16,
        dim_head=16,
        heads=1,
        num_landmarks=landmarks,
        residual=conv > 0,
        residual_conv_kernel=max(conv, 1),
    ).double()
    x = numbers(1, tokens, 16)

    def theirs() -> Tensor:
        weights = {
            "to_qkv.weight": layer.get_parameter("projections.qkv.weight"),
            "to_out.0.weight": layer.get_parameter("projections.out.weight"),
            "to_out.0.bias": torch.zeros(16, dtype=x.dtype),
        }
        if conv:
            weights["res_conv.weight"] = layer.get_parameter("filters")[:, None, :, None]
        y: Tensor = functional_call(other, weights, (x,))
        return y

    assert_same(lambda: feed(layer, x, causal=False), theirs, [x, *layer.parameters()])
