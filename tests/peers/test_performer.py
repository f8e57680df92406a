"""Performer beside performer-pytorch, with the same directions.

Taken away: the constants that theirs adds to softmax features (10⁻⁴) and, causally, to the normaliser
(10⁻⁶). With the first its estimate is biased. What it subtracts from exponents cancels, but for keys
it is a maximum over the whole sequence: harmless in float64, a leak in its roundings where causal.
"""

from __future__ import annotations

from functools import partial

import pytest
from oracles import assert_same, dims_for, feed, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.performer import Performer, PerformerConfig

pytestmark = pytest.mark.peers


# it compares torch's version by a class that setuptools has deprecated, and calls distutils for it
@pytest.mark.filterwarnings("ignore:distutils Version classes are deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The distutils package is deprecated:DeprecationWarning")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("features", ["softmax", "relu"])
@pytest.mark.parametrize("tokens", [1, 50, 300])
def test_equals_performer_pytorch(
    causal: bool, features: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = peer("performer_pytorch.performer_pytorch")
    monkeypatch.setattr(package, "softmax_kernel", partial(package.softmax_kernel, eps=0.0))
    dims = dims_for(tokens, 2)
    layer = make_layer(Performer, PerformerConfig(features=features, n_features=20, chunk=16), dims)
    assert isinstance(layer, Performer)
    other = package.FastAttention(
        dims.head_dim, nb_features=20, causal=causal, generalized_attention=features == "relu"
    ).double()
    other.projection_matrix.copy_(layer.directions)
    if causal:
        other.causal_linear_fn = partial(package.causal_linear_attention_noncuda, chunk_size=5, eps=0.0)
    x = numbers(2, tokens, dims.d_model)

    def theirs() -> Tensor:
        return layer.projections.merge(other(*layer.projections.split(x)))

    assert_same(lambda: feed(layer, x, causal=causal), theirs, [x, *layer.parameters()])
