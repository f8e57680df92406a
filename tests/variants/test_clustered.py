"""Clustered attention against what it reduces to, its clusters, and the leak of a causal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, dims_for, everything, feed, make_layer, numbers, oracle
from torch import Tensor

from bench.measure import causality_gate
from bench.measure.gate_failed import GateFailed
from variants.attention.clustered import Clustered, ClusteredConfig, _Tiles
from variants.base import Context, VariantConfig
from variants.ops.clustering.hamming import hamming_clusters, signs

SMALL: list[dict[str, Any]] = [
    {"clusters": 5, "keys": 4, "bits": 9, "steps": 2},
    {"clusters": 6, "form": "plain", "bits": 16, "steps": 3},
]


def layer_of(tokens: int, **knobs: Any) -> Clustered:
    layer = make_layer(Clustered, ClusteredConfig(**knobs), dims_for(tokens))
    assert isinstance(layer, Clustered)
    return layer


def dense_again(layer: Clustered, tokens: int) -> None:
    x = numbers(2, tokens, 16)
    assert_same(
        lambda: feed(layer, x, causal=False),
        lambda: oracle(layer, x, everything(tokens, causal=False)),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("tokens", [1, 2, 23])
def test_with_all_keys_exact_it_is_dense_attention(tokens: int) -> None:
    """Their weights sum to 1 in each cluster, and are distributed by each query's own."""
    dense_again(layer_of(tokens, clusters=3, keys=100), tokens)


@pytest.mark.parametrize("form", ["plain", "improved"])
def test_a_cluster_for_every_query_is_dense_attention(form: str) -> None:
    """Queries that all have bits of their own: many bits, and centroids that start from them."""
    layer = layer_of(12, clusters=12, bits=256, keys=3, form=form)
    cluster, _ = layer.choices(numbers(2, 12, 16).detach(), Context(causal=False))
    assert torch.equal(cluster, torch.arange(12).expand(2, 2, 12))
    dense_again(layer, 12)


def test_the_improved_form_is_nearer_to_dense_attention() -> None:
    x = numbers(2, 60, 16).detach()
    errors = []
    for knobs in ({"form": "plain"}, {"keys": 4}, {"keys": 20}):
        layer = layer_of(60, clusters=6, **knobs)
        target = layer.softmax_target(x, Context(causal=False))
        errors.append((feed(layer, x, causal=False) - target).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def slow_clusters(bits: Tensor, clusters: int, steps: int) -> list[int]:
    """K-means of rows of +1 and −1, written with lists."""
    rows = bits.int().tolist()
    centroids = [rows[i * len(rows) // clusters] for i in range(clusters)]

    def assign() -> list[int]:
        def different(row: list[int], other: list[int]) -> int:
            return sum(a != b for a, b in zip(row, other, strict=True))

        return [min(range(clusters), key=lambda c: (different(row, centroids[c]), c)) for row in rows]

    for _ in range(steps):
        found = assign()
        for c in range(clusters):
            members = [row for row, cluster in zip(rows, found, strict=True) if cluster == c]
            if members:
                centroids[c] = [1 if sum(column) >= 0 else -1 for column in zip(*members, strict=True)]
    return assign()


@pytest.mark.parametrize(("tokens", "clusters", "steps"), [(40, 5, 1), (40, 5, 4), (33, 33, 2)])
def test_clusters_are_those_of_k_means_in_hamming_space(tokens: int, clusters: int, steps: int) -> None:
    x, planes = numbers(2, 3, tokens, 8).detach(), numbers(3, 8, 11, seed=4).detach()
    got = hamming_clusters(x, planes, clusters, steps, "cpu")
    bits = signs(x, planes)
    want = [[slow_clusters(bits[b, h], clusters, steps) for h in range(3)] for b in range(2)]
    assert got.tolist() == want


@pytest.mark.parametrize(("tokens", "clusters"), [(1, 1), (9, 4), (100, 3), (97, 10)])
def test_a_tile_holds_queries_of_one_cluster(tokens: int, clusters: int) -> None:
    cluster = torch.randint(clusters, (2, 3, tokens), generator=torch.Generator().manual_seed(0))
    tiles = _Tiles(cluster, clusters)
    x = torch.arange(tokens, dtype=torch.float64).expand(2, 3, tokens)[..., None]
    assert torch.equal(tiles.by_token(tiles.queries(x)), x)  # every token has a slot of its own
    of_tile = tiles.cluster.repeat_interleave(tiles.size, dim=-1)
    assert torch.equal(of_tile.gather(-1, tiles.slot), cluster)


class Causal(Clustered):
    """A causal mask in the exact part alone: clusters, means and the largest keys follow from all queries."""

    info = Clustered.info.__class__(
        **{**Clustered.info.__dict__, "caps": Clustered.info.caps.__class__(causal=True, bidirectional=True)}
    )

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        return None

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> Any:
        content, q, k, v = self._split(x, ctx.positions)
        cluster = self._clusters(content)
        means = self._mean_queries(q, cluster).gather(2, cluster[..., None].expand_as(q))
        y = torch.nn.functional.scaled_dot_product_attention(means, k, v, is_causal=ctx.causal)
        return super().forward(x, ctx)._replace(y=self.projections.merge(y))


def test_the_gate_finds_later_queries_in_a_mean() -> None:
    """Although each mean reads only the keys up to its token."""
    with pytest.raises(GateFailed, match="causality gate"):
        causality_gate.leak(Causal, ClusteredConfig(clusters=5), dims_for(60, 2), 2, torch.device("cpu"))


def test_causal_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="has later queries in it"):
        layer_of(20)(torch.zeros(1, 20, 16), Context(causal=True))


def test_clusters_do_not_depend_on_positions() -> None:
    layer, x = layer_of(30, clusters=4), numbers(1, 30, 16).detach()
    here, later = (
        layer.choices(x, Context(causal=False, positions=torch.arange(30) + begin))[0] for begin in (0, 500)
    )
    assert torch.equal(here, later)


def test_the_seed_decides_the_projections() -> None:
    one, same, other = (make_layer(Clustered, ClusteredConfig(), dims_for(9), seed=s) for s in (1, 1, 2))
    assert difference(one.get_buffer("planes"), same.get_buffer("planes")) <= EXACT
    assert not torch.equal(one.get_buffer("planes"), other.get_buffer("planes"))
