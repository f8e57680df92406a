"""Cluster-Former: its chunks against a loop, its two kinds of layers, and centroids that move once a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    assert_same,
    dims_for,
    drawn,
    everything,
    feed,
    make_layer,
    numbers,
    oracle,
    rotated,
    softmax_attention,
)
from torch import Tensor

from bench.measure import causality_gate
from bench.measure.gate_failed import GateFailed
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import Batch
from bench.train.step import optimizer_for, training_step
from variants.attention.cluster_former import ClusterFormer, ClusterFormerConfig
from variants.base import Caps, Context, VariantConfig

SMALL: list[dict[str, Any]] = [
    {"n_clusters": 5, "chunk": 16, "window": 7, "decay": 0.5, "cluster_layers": "all"},
    {"n_clusters": 5, "chunk": 16, "window": 7, "decay": 0.5},
    {"n_clusters": 90, "chunk": 9, "cluster_layers": "all"},
]
CTX = Context(causal=False)


def layer_of(tokens: int, *, index: int = 1, **knobs: Any) -> ClusterFormer:
    layer = make_layer(ClusterFormer, ClusterFormerConfig(**knobs), dims_for(tokens), index=index)
    assert isinstance(layer, ClusterFormer)
    return layer


def same_as_mask(layer: ClusterFormer, allowed: Tensor) -> None:
    x = numbers(2, len(allowed), 16)
    assert_same(
        lambda: feed(layer, x, causal=False), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )


@pytest.mark.parametrize("tokens", [1, 2, 23])
def test_one_chunk_is_dense_attention(tokens: int) -> None:
    same_as_mask(layer_of(tokens, n_clusters=6, chunk=23), everything(tokens, causal=False))


@pytest.mark.parametrize("tokens", [1, 8, 16, 29])
def test_one_cluster_keeps_the_order_of_the_tokens(tokens: int) -> None:
    """Its chunks are those of the sequence."""
    same_as_mask(layer_of(tokens, n_clusters=1, chunk=8), drawn(tokens, lambda i, j: i // 8 == j // 8))


@pytest.mark.parametrize("tokens", [1, 29])
def test_even_layers_read_a_window(tokens: int) -> None:
    layer = layer_of(tokens, index=2, window=5)
    same_as_mask(layer, drawn(tokens, lambda i, j: abs(i - j) < 5))
    assert layer.choices(numbers(1, tokens, 16), CTX) is None
    assert not list(layer.buffers())


def by_loops(layer: ClusterFormer, x: Tensor) -> Tensor:
    """Sorting and chunks with lists, one sequence after another; the nearest centroid by cosine."""
    sequences, chunk = [], layer.config.chunk
    for sequence in x:
        centred = sequence.detach() - sequence.detach().mean(dim=-1, keepdim=True)
        cosine = F.cosine_similarity(centred[:, None], layer.centroids, dim=-1)  # (T, K)
        nearest = [max(range(len(row)), key=row.__getitem__) for row in cosine.tolist()]
        order = sorted(range(len(sequence)), key=lambda token: (nearest[token], token))
        q, k, v = (
            (sequence[None] @ weight.T).unflatten(-1, (layer.dims.heads, -1))
            for weight in layer.projections.qkv.weight.chunk(3)
        )
        q, k, y = rotated(q), rotated(k), torch.zeros_like(v)
        for begin in range(0, len(order), chunk):
            members = order[begin : begin + chunk]
            here = (t[:, members] for t in (q, k, v))
            y[:, members] = softmax_attention(*here, torch.ones(1, 1, 1))  # type: ignore[call-arg]
        sequences.append(y.flatten(2) @ layer.projections.out.weight.T)
    return torch.cat(sequences)


@pytest.mark.parametrize(("tokens", "clusters", "chunk"), [(61, 5, 16), (64, 9, 16), (40, 3, 7), (17, 50, 1)])
def test_equals_sorting_and_cutting_with_lists(tokens: int, clusters: int, chunk: int) -> None:
    layer, x = layer_of(tokens, n_clusters=clusters, chunk=chunk), numbers(3, tokens, 16)
    found = layer.choices(x, CTX)
    assert found is not None
    assert found.unique().numel() > 2
    assert_same(lambda: feed(layer, x, causal=False), lambda: by_loops(layer, x), [x, *layer.parameters()])


def test_tokens_read_what_resembles_them_at_any_distance() -> None:
    """Four kinds of tokens in turn, and a chunk for each kind."""
    layer = layer_of(64, n_clusters=4, chunk=16)
    kinds = F.normalize(numbers(4, 16).detach() - numbers(4, 16).detach().mean(-1, keepdim=True), dim=-1)
    layer.centroids.copy_(kinds[None])
    kind = torch.arange(64) % 4
    x = (kinds[kind] + 0.01 * numbers(64, 16, seed=5).detach())[None].requires_grad_()
    for token in (0, 5, 63):
        (reads,) = torch.autograd.grad(feed(layer, x, causal=False)[0, token].sum(), x)
        assert torch.equal(reads[0].abs().sum(dim=-1) > 0, kind == kind[token])


def test_clusters_do_not_depend_on_positions() -> None:
    layer, x = layer_of(30, n_clusters=4, chunk=8), numbers(2, 30, 16).detach()
    later = Context(causal=False, positions=torch.arange(30) + 500)
    torch.testing.assert_close(layer(x, later).y, layer(x, CTX).y, rtol=1e-9, atol=1e-9)


class Causal(ClusterFormer):
    """A triangular mask between the tokens of a chunk: the borders still follow from all tokens."""

    info = replace(ClusterFormer.info, caps=Caps(causal=True, bidirectional=True))

    @classmethod
    def no_form(cls, config: VariantConfig, *, causal: bool) -> str | None:
        return None

    def forward(self, x: Tensor, ctx: Context, state: Any = None) -> Any:
        found = self.choices(x, ctx)
        assert found is not None
        rank = found.argsort(dim=-1, stable=True).argsort(dim=-1) // self.config.chunk
        allowed = (rank[:, :, None] == rank[:, None]) & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        q, k, v = self.projections.split(x, ctx.positions)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        return super().forward(x, ctx)._replace(y=self.projections.merge(y))


def test_the_gate_finds_later_tokens_that_move_borders() -> None:
    config = ClusterFormerConfig(n_clusters=5, chunk=8, cluster_layers="all")
    with pytest.raises(GateFailed, match="causality gate"):
        causality_gate.leak(Causal, config, dims_for(60, 2), 2, torch.device("cpu"))


def test_causal_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="a later token moves earlier tokens to other chunks"):
        layer_of(20)(torch.zeros(1, 20, 16), Context(causal=True))


def test_a_step_moves_each_centroid_towards_its_members_once() -> None:
    layer = layer_of(40, n_clusters=60, chunk=8, decay=0.9).float().eval()
    x, start = numbers(1, 40, 16).detach().float(), layer.centroids.clone()
    layer(x, CTX)
    layer.after_step()
    assert torch.equal(layer.centroids, start)  # nothing is learnt in eval mode
    layer.train()
    for tokens in (x + 1, x.flip(-1), x):
        layer(tokens, CTX)
    found = layer.choices(x, CTX)
    assert found is not None
    layer.after_step()
    for cluster in range(60):
        members = F.layer_norm(x[found == cluster], (16,)).sum(dim=0)  # of the last pass only
        want = start[0, cluster]
        if members.any():
            want = F.normalize(0.9 * want + 0.1 * F.normalize(members, dim=0), dim=0)
        torch.testing.assert_close(layer.centroids[0, cluster], want)
    moved = layer.centroids.clone()
    layer.after_step()
    assert torch.equal(layer.centroids, moved)


def test_recomputation_does_not_move_centroids_twice() -> None:
    config, models = ClusterFormerConfig(n_clusters=4, chunk=8, window=4, decay=0.5), []
    for activations in ("keep", "checkpoint"):
        torch.manual_seed(0)
        spec = ModelSpec.of(ClusterFormer, config, feed_forward=feed_forward(mult=2))
        sizes = {"depth": 2, "dropout": 0.0, "vocabulary": 11}
        model = LanguageModel(spec, dims_for(32, 2), activations=activations, **sizes).train()  # type: ignore[arg-type]
        assert [layer.reads_clusters for layer in model.layers] == [False, True]
        optimizer, start = optimizer_for(model, 1e-2), model.layers[1].get_buffer("centroids").clone()
        tokens = torch.randint(11, (2, 32))
        for _ in range(2):
            training_step(model, optimizer, Batch(tokens, tokens), causal=False)
        assert (model.layers[1].get_buffer("centroids") - start).abs().max() > 0.1
        models.append(model)
    for one, other in zip(*(m.state_dict().values() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
