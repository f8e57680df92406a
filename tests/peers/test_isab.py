"""Induced set attention beside isab-pytorch, and beside torch's multi-head attention.

Taken away: our rotary positions. The residual and the norm after the first attention are ours: the one has
none, and the other is an attention alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch.nn.functional as F
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor, nn
from torch.func import functional_call

from peers import peer
from variants.attention.isab import Isab, IsabConfig
from variants.base import Dims
from variants.ops.projections import Projections

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]

Attention: TypeAlias = Callable[[Dims, Projections, Tensor, Tensor], Tensor]


def package_attention(dims: Dims, weights: Projections, asking: Tensor, asked: Tensor) -> Tensor:
    """Attention of isab-pytorch with our weights."""
    module = peer("isab_pytorch.isab_pytorch")
    other = module.Attention(dims.d_model, dims.heads, dims.head_dim).double()
    q, kv = weights.qkv.weight.split([dims.inner_dim, 2 * dims.inner_dim])
    given = {"to_q.weight": q, "to_kv.weight": kv, "to_out.weight": weights.out.weight}
    y: Tensor = functional_call(other, given, (asking, asked))
    return y


def torch_attention(dims: Dims, weights: Projections, asking: Tensor, asked: Tensor) -> Tensor:
    """torch's, in which the weights have the same layout."""
    other = nn.MultiheadAttention(dims.d_model, dims.heads, bias=False, batch_first=True).double()
    given = {"in_proj_weight": weights.qkv.weight, "out_proj.weight": weights.out.weight}
    y: Tensor = functional_call(other, given, (asking, asked, asked), {"need_weights": False})[0]
    return y


@pytest.mark.parametrize("attention", [package_attention, torch_attention])
@pytest.mark.parametrize("weights", ["shared", "separate"])
@pytest.mark.parametrize(("tokens", "points"), [(1, 1), (40, 7), (300, 16), (5, 40)])
def test_equals_two_attentions(attention: Attention, weights: str, tokens: int, points: int) -> None:
    dims = dims_for(tokens, 2)
    layer = make_layer(Isab, IsabConfig(points=points, weights=weights), dims)  # type: ignore[arg-type]
    assert isinstance(layer, Isab)
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        latents = layer.points.expand(2, -1, -1)
        first = layer.projections if weights == "shared" else layer.induction
        hidden = latents + attention(dims, first, latents, x)
        hidden = F.layer_norm(hidden, (dims.d_model,), layer.norm.weight, layer.norm.bias)
        return attention(dims, layer.projections, x, hidden)

    assert_same(lambda: feed(layer, x, causal=False), theirs, [x, *layer.parameters()])
