"""Sparse Sinkhorn attention beside sinkhorn-transformer, without a mask.

Taken away: our rotary positions, its output bias and its noise. It takes the sorted keys for the sorted
values too, which is an error; one weight is given for keys and values here, so that it does not show. The
scores of its blocks are clipped at 0, and their logarithm is taken; here its operator normalises the scores
themselves. It ends with the columns, so it is given the transpose. Its means of blocks are scaled to our sums
over a square root. Its causal layer reads the blocks with the highest scores, which is another method.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, make_layer, numbers
from torch import Tensor, nn
from torch.func import functional_call

from peers import peer
from variants.attention.sinkhorn import Sinkhorn, SinkhornConfig
from variants.base import Context
from variants.ops.clustering.block_sorting import balanced

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]


class Sort(nn.Module):
    """Their sort net with their operator, without what the docstring of this file names."""

    def __init__(self, package: Any, block: int, head_dim: int, config: SinkhornConfig) -> None:
        super().__init__()
        self.package, self.block, self.config = package, block, config
        self.scale = block / head_dim**0.5

    def forward(self, q: Tensor, k: Tensor, topk: int) -> Tensor:
        assert topk == 1
        q, k = (self.package.bucket(x.shape[1] // self.block, x).mean(2) for x in (q, k))
        scores = torch.einsum("bie,bje->bij", q, k) * self.scale / self.config.temperature
        weights: Tensor = self.package.sinkhorn_sorting_operator(scores.mT, self.config.iterations)
        return weights.mT


@pytest.mark.parametrize("iterations", [1, 5, 20])
def test_normalisation_is_theirs_of_the_transpose(iterations: int) -> None:
    operator = peer("sinkhorn_transformer.sinkhorn_transformer").sinkhorn_sorting_operator
    scores = numbers(3, 7, 7)
    assert_same(
        lambda: balanced(scores[:, None], iterations).exp()[:, 0],
        lambda: operator(scores.mT, iterations).mT,
        [scores],
    )


@pytest.mark.parametrize(("block", "count", "iterations"), [(8, 1, 5), (5, 8, 1), (16, 4, 5), (1, 12, 7)])
def test_equals_sinkhorn_transformer(block: int, count: int, iterations: int) -> None:
    package = peer("sinkhorn_transformer.sinkhorn_transformer")
    tokens = block * count
    dims, config = dims_for(tokens, 2), SinkhornConfig(block=block, iterations=iterations)
    layer = make_layer(Sinkhorn, config, dims)
    assert isinstance(layer, Sinkhorn)
    other = package.SinkhornSelfAttention(dims.d_model, block, tokens, heads=dims.heads).double()
    other.sinkhorn_attention.sort_net = Sort(package, block, dims.head_dim, config)
    queries, shared, _ = (w.detach().requires_grad_() for w in layer.projections.qkv.weight.chunk(3))
    out = layer.projections.out.weight
    x = numbers(2, tokens, dims.d_model)

    def ours(keys: Tensor, values: Tensor) -> Tensor:
        weights = {"projections.qkv.weight": torch.cat([queries, keys, values])}
        y: Tensor = functional_call(layer, weights, (x, Context(causal=False))).y
        return y

    def theirs() -> Tensor:
        weights = {
            "to_q.weight": queries,
            "to_kv.weight": torch.cat([shared, shared]),
            "to_out.weight": out,
            "to_out.bias": x.new_zeros(dims.d_model),
        }
        y: Tensor = functional_call(other, weights, (x,))
        return y

    assert_same(lambda: ours(shared, shared), theirs, [x, queries, shared, out])
    assert difference(ours(shared, -shared).detach(), theirs().detach()) > EXACT  # values are read
