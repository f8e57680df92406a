"""Longformer beside transformers' Longformer and LED encoders, and local-attention's exact windows.

Taken away: our rotary positions, their biases. transformers' is bidirectional, has no dilation, wants a
length that is a multiple of its window and 2 neighbours or more a side, and takes its softmax in float32
whatever its weights are. local-attention wants such a length too where bidirectional: it can pad, but then
the last queries read the padding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor, nn
from torch.func import functional_call

from peers import peer, sizes
from variants.attention.longformer import Longformer, LongformerConfig

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]

FLOAT32_SOFTMAX = 2e-6
"""Largest difference, where one of two float64 computations rounds its weights to float32."""


@pytest.fixture(params=["longformer", "led"])
def attention(request: pytest.FixtureRequest) -> type[nn.Module]:
    name = {"longformer": "LongformerSelfAttention", "led": "LEDEncoderSelfAttention"}[request.param]
    module = peer(f"transformers.models.{request.param}.modeling_{request.param}")
    found: type[nn.Module] = getattr(module, name)
    return found


def weights_of(layer: Longformer, other: nn.Module) -> dict[str, Tensor]:
    """Our weights by their names; zero biases."""
    weights = {name: torch.zeros_like(p) for name, p in other.named_parameters() if name.endswith("bias")}
    sets = {"": layer.get_parameter("projections.qkv.weight")}
    if layer.config.global_tokens:
        sets["_global"] = layer.get_parameter("global_qkv.weight")
    for ending, qkv in sets.items():
        for name, weight in zip(("query", "key", "value"), qkv.chunk(3), strict=True):
            weights[f"{name}{ending}.weight"] = weight
    return weights


@pytest.mark.parametrize("one_sided", [2, 4, 8])
@pytest.mark.parametrize("n_global", [0, 1, 3, 11])
@pytest.mark.parametrize("tokens", [16, 64])
def test_equals_transformers(attention: type[nn.Module], one_sided: int, n_global: int, tokens: int) -> None:
    transformers = peer("transformers")
    dims = dims_for(tokens, 2)
    config = LongformerConfig(window=(one_sided + 1,), global_tokens=n_global)
    layer = make_layer(Longformer, config, dims)
    assert isinstance(layer, Longformer)
    settings = transformers.LongformerConfig(
        **sizes(dims),
        attention_window=[2 * one_sided],
        attention_probs_dropout_prob=0.0,
    )
    other = attention(settings, 0).double()
    x = numbers(2, tokens, dims.d_model)
    is_global = (torch.arange(tokens) < n_global).expand(2, -1)
    given: dict[str, Any] = {
        "attention_mask": 10_000.0 * is_global,
        "is_index_masked": torch.zeros(2, tokens, dtype=torch.bool),
        "is_index_global_attn": is_global,
        "is_global_attn": bool(n_global),
    }
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: layer.projections.out(functional_call(other, weights_of(layer, other), (x,), given)[0]),
        [x, *layer.parameters()],
        tolerance=FLOAT32_SOFTMAX,
    )


@pytest.mark.parametrize(
    ("causal", "tokens", "reach"),
    [(True, 64, 8), (True, 40, 1), (True, 37, 6), (False, 64, 8), (False, 40, 1), (False, 36, 6)],
)
def test_equals_local_attention(causal: bool, tokens: int, reach: int) -> None:
    local_attention = peer("local_attention")
    dims = dims_for(tokens, 2)
    layer = make_layer(Longformer, LongformerConfig(window=(reach + 1,)), dims)
    assert isinstance(layer, Longformer)
    other = local_attention.LocalAttention(
        window_size=reach, causal=causal, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False
    )
    x = numbers(2, tokens, dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: layer.projections.merge(other(*layer.projections.split(x))),
        [x, *layer.parameters()],
    )
