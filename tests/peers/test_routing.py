"""Routing attention's clusters beside routing-transformer's, bidirectional, where both take the nearest
tokens of each centroid.

Taken away: our rotary positions; our normalisation of queries and keys, given to theirs, which clusters
normalised tokens and attends with what it is given; the 10⁻⁵ that theirs adds to the number of clusters
that a token is in. Causally the two differ beyond that: with shared queries and keys a token of theirs
does not read itself, without it reads a learnt key besides.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch.nn.functional as F
from oracles import assert_same, difference, dims_for, make_layer, numbers
from torch import Tensor

from peers import peer
from variants.attention.routing import Routing, RoutingConfig
from variants.base import Context
from variants.ops.clustering import clusters
from variants.ops.clustering.kmeans import unit

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("without_rotary")]

ROUNDED = 1e-6
"""Our centroids are float32."""


@pytest.mark.parametrize(("tokens", "n_clusters"), [(24, 1), (64, 8), (63, 7), (5, 5)])
def test_equals_routing_transformer(tokens: int, n_clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    package = peer("routing_transformer.routing_transformer")
    monkeypatch.setattr(package, "scatter_mean", partial(package.scatter_mean, eps=1e-300))
    dims, decay = dims_for(tokens, 2), 0.7
    layer = make_layer(Routing, RoutingConfig(n_clusters=n_clusters, decay=decay), dims).train()
    assert isinstance(layer, Routing)
    other = package.KmeansAttention(
        n_clusters, tokens // n_clusters, layer.routed, dims.head_dim, ema_decay=decay
    )
    other = other.double().train()
    other.kmeans.means.copy_(layer.centroids)
    other.kmeans.initted.fill_(True)
    q, k, v = (numbers(2, tokens, layer.routed, dims.head_dim, seed=seed) for seed in (1, 2, 3))

    def theirs() -> Tensor:
        by_head = (t.transpose(1, 2) for t in (unit(q), unit(k), v))
        return other(*by_head)[0].transpose(1, 2)

    ctx = Context(causal=False)
    assert_same(lambda: layer.in_clusters(q, k, v, ctx, clusters.TILES), theirs, [q, k, v])

    # both moved towards the mean directions of the nearest tokens; ours stays on the sphere
    layer.after_step()
    other.kmeans.update()
    moved = F.normalize(other.kmeans.means, dim=-1)
    assert difference(layer.centroids.double(), moved) <= ROUNDED
