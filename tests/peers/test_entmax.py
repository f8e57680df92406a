"""α-entmax beside the package entmax of its authors, which normalises the scores of dense attention.

Nothing is taken away. Theirs finds τ by bisection for any α, and by sorting for 1.5 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.entmax import Entmax, EntmaxConfig
from variants.ops.entmax import entmax

pytestmark = pytest.mark.peers

TOKENS = [1, 40, 300]


def attention(layer: Entmax, x: Tensor, weights_of: Callable[[Tensor], Tensor], *, causal: bool) -> Tensor:
    """Attention with their weights."""
    q, k, v = layer.projections.split(x)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return layer.projections.merge(weights_of(scores) @ v)


def compare(layer: Any, tokens: int, weights_of: Callable[[Tensor], Tensor], *, causal: bool) -> None:
    assert isinstance(layer, Entmax)
    x = numbers(2, tokens, layer.dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: attention(layer, x, weights_of, causal=causal),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("alpha", "name"), [(1.5, "entmax15"), (2.0, "sparsemax")])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_exact_algorithms(tokens: int, alpha: float, name: str, causal: bool) -> None:
    weights_of = getattr(peer("entmax"), name)
    layer = make_layer(Entmax, EntmaxConfig(alpha=alpha), dims_for(tokens, 2))
    compare(layer, tokens, lambda scores: weights_of(scores, dim=-1), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.8, 2.0])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_bisection(tokens: int, alpha: float, causal: bool) -> None:
    bisect = peer("entmax").entmax_bisect
    layer = make_layer(Entmax, EntmaxConfig(alpha=alpha), dims_for(tokens, 2))
    compare(layer, tokens, lambda scores: bisect(scores, alpha), causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.9])
@pytest.mark.parametrize("tokens", TOKENS)
def test_learnt_alphas_have_the_same_gradients(tokens: int, alpha: float, causal: bool) -> None:
    """With an α of its own for each head."""
    bisect = peer("entmax").entmax_bisect
    layer = make_layer(Entmax, EntmaxConfig(alpha=alpha, learn_alpha=True), dims_for(tokens, 2))
    assert isinstance(layer, Entmax)
    with torch.no_grad():
        layer.alpha_logits += torch.linspace(-1, 1, len(layer.alpha_logits))

    def weights_of(scores: Tensor) -> Tensor:
        assert isinstance(layer.alpha, Tensor)
        weights: Tensor = bisect(scores, layer.alpha[:, None, None])
        return weights

    compare(layer, tokens, weights_of, causal=causal)


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_weights_of_any_scores_are_the_same(spread: float) -> None:
    """Almost equal scores, and scores of which one takes all the weight."""
    package = peer("entmax")
    scores = spread * numbers(7, 50)
    assert_same(lambda: entmax(scores, 1.5), lambda: package.entmax15(scores, dim=-1), [scores])
    assert_same(lambda: entmax(scores, 2.0), lambda: package.sparsemax(scores, dim=-1), [scores])
    assert_same(lambda: entmax(scores, 1.25), lambda: package.entmax_bisect(scores, 1.25), [scores])
