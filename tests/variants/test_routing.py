"""Routing attention: its limits, its two selections, and centroids that move once a step."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import rotated
from scipy.stats import chi2
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import gates
from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from bench.model.language_model import LanguageModel
from bench.model.slots import ModelSpec, feed_forward
from bench.tasks.text import Batch
from bench.train.step import optimizer_for, training_step
from variants.attention.routing import Routing, RoutingConfig
from variants.base import Context, SequenceMixer, Workload
from variants.ops.clustering import clusters, kmeans, kmeans_attention, kmeans_flash
from variants.ops.projections import masked_attention, rotary
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [
    {"n_clusters": 5, "window": 7, "cluster_window": 6, "decay": 0.5},
    {"n_clusters": 5, "window": 7, "selection": "topk", "decay": 0.5},
    {"n_clusters": 5, "window": 7, "cluster_window": 6, "selection": "random"},
]

CPU = torch.device("cpu")


def make(tokens: int, *, heads: int = 4, head_dim: int = 8, seed: int = 0, **knobs: object) -> Routing:
    torch.manual_seed(seed)
    config = RoutingConfig(**knobs)  # type: ignore[arg-type]
    layer = Routing(
        config, Workload(causal=True, batch_size=1, seq_len=tokens, d_model=heads * head_dim, heads=heads)
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return layer.double().eval()


def same_with_gradients(layer: Routing, got: Tensor, want: Tensor, x: Tensor) -> None:
    direction = torch.randn_like(want)
    inputs = [x, *layer.parameters()]
    a = torch.autograd.grad(got, inputs, direction, materialize_grads=True)
    b = torch.autograd.grad(want, inputs, direction, materialize_grads=True)
    for one, other in zip((got, *a), (want, *b), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("selection", "causal"),
    [(name, causal) for name in ("nearest", "topk", "random") for causal in (True, False)],
)
def test_one_cluster_of_all_tokens_is_dense_over_normalised_queries_and_keys(
    selection: str, causal: bool
) -> None:
    tokens, heads, dim = 37, 4, 8
    layer = make(tokens, n_clusters=1, window=tokens, selection=selection)
    x = torch.randn(3, tokens, heads * dim, dtype=torch.float64, requires_grad=True)
    half = heads * dim // 2
    q, k, v, q_r, v_r, k_r = F.linear(x, layer.projections.qkv.weight).split(half, dim=-1)
    if causal or selection != "topk":
        k_r = q_r

    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads // 2, dim))

    def norm(t: Tensor) -> Tensor:
        return F.layer_norm(split(t), (dim,))

    rows = [
        (rotary(split(q)), rotary(split(k)), split(v)),
        (rotary(norm(q_r)), rotary(norm(k_r)), split(v_r)),
    ]
    allowed = torch.ones(tokens, tokens).tril().bool() if causal else torch.ones(tokens, tokens).bool()
    heads_out = [masked_attention(*(t.transpose(1, 2) for t in row), allowed) for row in rows]
    same_with_gradients(
        layer, layer(x, Context(causal=causal)).y, layer.projections.merge(torch.cat(heads_out, dim=1)), x
    )


@pytest.mark.parametrize("impl", ["tiles", "flash"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selection", ["nearest", "topk", "random"])
@pytest.mark.parametrize(
    ("batch", "tokens", "knobs"),
    [
        (1, 1, {}),
        (3, 2, {"n_clusters": 5}),
        (3, 61, {}),
        (1, 64, {"n_clusters": 3, "cluster_window": 40}),
        (2, 97, {"n_clusters": 7, "cluster_window": 3}),
        (1, 50, {"n_clusters": 4, "cluster_window": 1}),
        (2, 50, {"n_clusters": 2, "cluster_window": 49}),
    ],
)
def test_equals_its_reference(
    batch: int, tokens: int, knobs: dict[str, int], selection: str, causal: bool, impl: str
) -> None:
    """The oracle of the operator stands in for the kernel of flash, which `missing` demands of a cell."""
    layer = make(tokens, window=16, selection=selection, impl=impl, **knobs)
    if impl == "flash" and selection != "topk" and not causal:
        reason = Routing.unsupported(layer.config, replace(layer.dims, seq_len=64), causal=causal)
        assert reason == f"impl=flash: selection={selection} is causal; use selection=topk or impl=auto"
        return
    x = torch.randn(batch, tokens, 32, dtype=torch.float64, requires_grad=True)
    same_with_gradients(
        layer, layer(x, Context(causal=causal)).y, layer.reference(x, Context(causal=causal)), x
    )


def by_rank(x: Tensor, v: Tensor, cluster: Tensor, window: int, *, causal: bool) -> Tensor:
    """What `Windowed` computes, over all pairs: x, v (B, T, H, D), cluster (B, H, T)."""
    same = cluster[..., :, None] == cluster[..., None, :]
    rank = (same & torch.ones_like(same).tril()).sum(dim=-1)
    apart = rank[..., :, None] - rank[..., None, :]
    allowed = same & (apart < window) & (apart >= 0 if causal else apart > -window)
    q, k, values = (t.transpose(1, 2) for t in (x, x, v))
    return masked_attention(q, k, values, allowed).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("most", [1, 150, 10**6])
@pytest.mark.parametrize(
    ("tokens", "clusters", "window"),
    [
        (45, 4, 7),
        (45, 4, 1),
        (45, 1, 9),
        (45, 60, 3),
        (45, 3, 44),
        (45, 3, 45),
        (45, 3, 90),
        (1, 3, 2),
        (2, 1, 1),
    ],
)
def test_slices_of_any_size_compute_the_rule(
    tokens: int, clusters: int, window: int, most: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, v = (torch.randn(2, tokens, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cluster = torch.randint(clusters, (2, 3, tokens))
    monkeypatch.setattr(kmeans_attention, "SLICE", Sizes(most, most))
    monkeypatch.setattr(kmeans_attention, "MOST_PIECES", 9)
    layout = kmeans_attention.lay_out(cluster, clusters, window, is_causal=causal)
    got = kmeans_attention.Windowed.apply(x, v, layout)
    want = by_rank(x, v, cluster, window, causal=causal)
    direction = torch.randn_like(got)
    for one, other in zip(
        (got, *torch.autograd.grad(got, (x, v), direction)),
        (want, *torch.autograd.grad(want, (x, v), direction)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("windows", "smallest"), [(1, 1), (2, 1), (2, 128)])
@pytest.mark.parametrize(
    ("tokens", "clusters", "window"),
    [
        (45, 4, 7),
        (45, 4, 1),
        (45, 1, 9),
        (45, 60, 3),
        (45, 3, 44),
        (45, 3, 90),
        (300, 3, 40),
        (1, 3, 2),
        (2, 1, 1),
    ],
)
def test_chunks_of_any_size_compute_the_rule(
    tokens: int,
    clusters: int,
    window: int,
    windows: int,
    smallest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clusters that are empty, of one chunk and of many; in one head all tokens are in the last cluster."""
    torch.manual_seed(0)
    x, v = (torch.randn(2, tokens, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cluster = torch.randint(clusters, (2, 3, tokens))
    cluster[1, 1] = clusters - 1
    monkeypatch.setattr(kmeans_flash, "WINDOWS", windows)
    monkeypatch.setattr(kmeans_flash, "SMALLEST", smallest)
    got = kmeans_flash.cluster_attention(x, v, cluster, clusters, window)
    want = by_rank(x, v, cluster, window, causal=True)
    direction = torch.randn_like(got)
    for one, other in zip(
        (got, *torch.autograd.grad(got, (x, v), direction)),
        (want, *torch.autograd.grad(want, (x, v), direction)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_no_chunk_is_longer_than_the_kernel_is_told() -> None:
    """And the keys of all chunks have places, whatever the sizes of clusters."""
    torch.manual_seed(0)
    for tokens, most_clusters, window in [(700, 3, 40), (700, 50, 7), (400, 400, 1), (129, 1, 64)]:
        bounds = kmeans_flash.bounds_of(2, tokens, most_clusters, window)
        for spread in (1, most_clusters):
            layout = kmeans_flash.lay_out(torch.randint(spread, (1, 2, tokens)), most_clusters, window)
            for offsets, most in (
                (layout.q_offsets, bounds.chunk),
                (layout.k_offsets, bounds.chunk + bounds.carried),
            ):
                assert offsets.diff().min() >= 0
                assert offsets.diff().max() <= most
            assert layout.q_offsets[-1] == 2 * tokens
            assert layout.k_offsets[-1] <= bounds.keys == len(layout.keys) - 1


@pytest.mark.parametrize("selection", ["nearest", "topk", "random"])
def test_flash_dispatches_the_flops_of_the_formula(selection: str) -> None:
    layer = make(300, window=16, selection=selection, impl="flash", n_clusters=4)
    with CountFlops() as counted:
        layer(torch.randn(2, 300, 32, dtype=torch.float64), Context(causal=True))
    work = Workload(causal=True, batch_size=2, seq_len=300, d_model=32, heads=4)
    assert counted.total == layer.cost(work).total


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_finite_differences(causal: bool) -> None:
    torch.manual_seed(0)
    x, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    layout = kmeans_attention.lay_out(torch.randint(2, (1, 2, 9)), 2, 3, is_causal=causal)
    assert torch.autograd.gradcheck(lambda a, b: kmeans_attention.Windowed.apply(a, b, layout), (x, v))


@pytest.mark.parametrize("selection", ["auto", "nearest", "random"])
@pytest.mark.parametrize("knobs", [{}, {"n_clusters": 5, "cluster_window": 9}, {"impl": "flash"}])
def test_nearest_does_not_see_the_future(selection: str, knobs: dict[str, Any]) -> None:
    config = RoutingConfig(selection=selection, **knobs)  # type: ignore[arg-type]
    assert Routing.leak(config) is None
    dims = Workload(causal=True, batch_size=2, seq_len=300, d_model=64, heads=4)
    assert gates.leak(Routing, config, dims, 2, CPU) <= gates.LEAK_TOLERANCE


def test_random_clusters_depend_on_the_position_alone() -> None:
    """The same with other content, in a prefix and in a longer sequence; no centroid moves."""
    layer = make(64, n_clusters=4, selection="random").train()
    before, ctx = layer.centroids.clone(), Context(causal=True)
    (one,), (other,), (longer,) = (
        layer.choices(torch.randn(2, n, 32, dtype=torch.float64), ctx) for n in (64, 64, 100)
    )
    assert torch.equal(one, other)
    assert torch.equal(one, longer[..., :64])
    assert not torch.equal(one[0, 0], one[0, 1])
    layer(torch.randn(2, 64, 32, dtype=torch.float64), ctx)
    layer.after_step()
    assert torch.equal(layer.centroids, before)


def test_random_clusters_are_uniform_and_independent_of_each_other() -> None:
    """χ² of the clusters, of pairs of neighbours, of heads and of layers, each below its 0.1 % point."""
    clusters_, tokens = 8, 20_000
    drawn = torch.stack([clusters.random_clusters(tokens, 4, clusters_, layer, CPU) for layer in range(3)])
    pairs = {
        "neighbours": (drawn[..., 1:], drawn[..., :-1]),
        "heads": (drawn[:, 1:], drawn[:, :-1]),
        "layers": (drawn[1:], drawn[:-1]),
    }
    counts = {"itself": drawn.flatten().bincount(minlength=clusters_)}
    counts |= {name: (a * clusters_ + b).flatten().bincount() for name, (a, b) in pairs.items()}
    for name, count in counts.items():
        expected = count.sum() / clusters_ ** (1 if name == "itself" else 2)
        squares = float(((count - expected).square() / expected).sum())
        assert squares < chi2.ppf(0.999, len(count) - 1), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "knobs"),
    [
        (300, 4, 16, {}),
        (257, 4, 6, {"n_clusters": 5, "cluster_window": 9, "window": 7}),
        (700, 2, 10, {"n_clusters": 40}),
        (263, 2, 14, {"n_clusters": 11}),
        (200, 4, 8, {"n_clusters": 3, "cluster_window": 199}),
        (200, 4, 8, {"n_clusters": 3, "cluster_window": 200}),
        (150, 4, 4, {"n_clusters": 150, "cluster_window": 20}),
        (90, 2, 2, {"n_clusters": 7, "cluster_window": 1}),
    ],
)
def test_later_tokens_change_no_rounding(
    tokens: int, heads: int, head_dim: int, knobs: dict[str, int], dtype: torch.dtype
) -> None:
    """By not one bit, in five layers: where a row and its keys lie, and so how sums round, is the past's."""
    config = RoutingConfig(**knobs)  # type: ignore[arg-type]
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=heads * head_dim, heads=heads)
    assert gates.leak(Routing, config, dims, 5, CPU, dtype) == 0


@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e300])
def test_no_later_number_reaches_an_earlier_token_of_its_cluster(poison: float) -> None:
    """With local windows of one token: torch's own kernel lets NaN through to the tokens of a block."""
    layer = make(80, n_clusters=2, window=1, cluster_window=30)
    x = torch.randn(2, 80, 32, dtype=torch.float64)
    poisoned = x.clone()
    poisoned[1, 50:] = poison
    want, got = layer(x, Context(causal=True)).y, layer(poisoned, Context(causal=True)).y
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :50], want[1, :50])
    assert not got[1, 50:].isfinite().any()


def test_a_value_that_is_not_finite_reaches_those_that_may_read_it() -> None:
    x, v = (torch.randn(1, 30, 1, 4, dtype=torch.float64) for _ in range(2))
    cluster = torch.arange(30).remainder(2).view(1, 1, 30)
    layout = kmeans_attention.lay_out(cluster, 2, 5, is_causal=True)
    v[0, 9] = float("inf")
    y = kmeans_attention.Windowed.apply(x, v, layout)
    assert (~y.isfinite()).all(dim=-1).flatten().nonzero().flatten().tolist() == [9, 11, 13, 15, 17]


@pytest.mark.slow
# torch's tracer makes an instance of every custom autograd.Function, against torch's own advice
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor, as it is imported
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler, g++"),
            ],
        ),
    ],
)
def test_nearest_compiles_to_one_graph(backend: str, causal: bool) -> None:
    layer = make(100, n_clusters=5, window=7, selection="nearest")
    x = torch.randn(2, 100, 32, dtype=torch.float64, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x, Context(causal=causal)).y, backend=backend, fullgraph=True)
    same_with_gradients(layer, compiled(x), layer(x, Context(causal=causal)).y, x)


def streamed(layer: Routing, x: Tensor, begin: int) -> tuple[Tensor, int]:
    """Outputs of the tokens from `begin` on, each from what is carried and itself; bytes carried at `begin`.

    One sequence (1, T, C). What is carried: (key, value) of a local head's last window − 1 tokens, and of a
    routed head's last cluster_window − 1 members of each cluster.
    """
    q, k, v, x_routed, _, v_routed = layer._split(x, shared=True)
    cluster, _ = kmeans.nearest(x_routed, layer.centroids)
    rows = rotated(F.layer_norm(x_routed, x_routed.shape[-1:]))
    local = [(rotated(q)[0, :, h], rotated(k)[0, :, h], v[0, :, h], None) for h in range(layer.local)]
    routed = [(rows[0, :, h], rows[0, :, h], v_routed[0, :, h], cluster[0, h]) for h in range(layer.routed)]
    outputs, carried = [], 0
    for queries, keys, values, kind in (*local, *routed):
        most = (layer.config.window if kind is None else layer.cluster_window) - 1
        empty = torch.empty(2, 0, keys.shape[-1], dtype=keys.dtype)
        state: dict[int, Tensor] = {}
        found = []
        for t in range(x.shape[1]):
            if t == begin:
                carried += sum(kept.numel() * kept.element_size() for kept in state.values())
            where = 0 if kind is None else int(kind[t])
            here = torch.cat([state.get(where, empty), torch.stack([keys[t], values[t]])[:, None]], dim=1)
            weights = (here[0] @ queries[t] / keys.shape[-1] ** 0.5).softmax(dim=0)
            found.append(weights @ here[1])
            state[where] = here[:, here.shape[1] - min(most, here.shape[1]) :]
        outputs.append(torch.stack(found)[begin:])
    return F.linear(torch.cat(outputs, dim=-1), layer.projections.out.weight), carried


@pytest.mark.parametrize("begin", [1, 2, 5, 80, 99])
@pytest.mark.parametrize(
    "knobs",
    [
        {"n_clusters": 1, "cluster_window": 9, "window": 4},
        {"n_clusters": 1, "cluster_window": 1, "window": 1},
        {"n_clusters": 3, "cluster_window": 6, "window": 40},
        {"n_clusters": 4, "cluster_window": 2, "window": 100},
        {"n_clusters": 1, "cluster_window": 100, "window": 2},
        {"n_clusters": 2, "cluster_window": 6, "window": 7},
    ],
)
def test_state_is_what_the_next_token_needs(knobs: dict[str, int], begin: int) -> None:
    """Going on from it alone gives the outputs of one pass, and it takes the bytes that the layer says."""
    layer = make(100, **knobs)
    x = torch.randn(1, 100, 32, dtype=torch.float64)
    got, carried = streamed(layer, x, begin)
    torch.testing.assert_close(got, layer(x, Context(causal=True)).y[0, begin:], rtol=1e-9, atol=1e-9)
    dims = Workload(causal=True, batch_size=1, seq_len=begin, d_model=32, heads=4, element_bytes=8)
    if begin in (1, 80, 99):  # between them, a cluster may be short of members that another has too many of
        assert carried == layer.state_bytes(dims)
    assert carried <= layer.state_bytes(dims)


def test_topk_states_the_leak_that_the_gate_finds() -> None:
    config = RoutingConfig(selection="topk")
    assert "selection=topk" in (Routing.leak(config) or "")
    dims = Workload(causal=True, batch_size=2, seq_len=300, d_model=64, heads=4)
    assert gates.leak(Routing, config, dims, 2, CPU) > 0.1


def test_topk_attention_itself_is_causal() -> None:
    # memberships held fixed: with one centroid that takes all, nothing is left to leak
    config = RoutingConfig(selection="topk", n_clusters=1)
    dims = Workload(causal=True, batch_size=1, seq_len=100, d_model=64, heads=4)
    assert gates.leak(Routing, config, dims, 2, CPU) <= gates.LEAK_TOLERANCE


def test_auto_is_nearest_where_causal_and_topk_where_not() -> None:
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    auto, nearest, topk = (make(60, selection=s) for s in ("auto", "nearest", "topk"))
    assert torch.equal(auto(x, Context(causal=True)).y, nearest(x, Context(causal=True)).y)
    assert torch.equal(auto(x, Context(causal=False)).y, topk(x, Context(causal=False)).y)
    assert not torch.allclose(nearest(x, Context(causal=False)).y, topk(x, Context(causal=False)).y)


def test_equal_tokens_are_taken_earliest_first_and_join_the_lowest_cluster() -> None:
    token = torch.randn(1, 1, 1, 8)
    x = token.expand(1, 20, 1, 8)
    centroids = F.normalize(torch.randn(1, 1, 8), dim=-1).expand(1, 4, 8)
    taken, sums = kmeans.members(x, centroids, 5)
    assert torch.equal(taken, torch.arange(5).expand(1, 1, 4, 5))
    cluster, also = kmeans.nearest(x, centroids)
    assert cluster.max() == 0
    torch.testing.assert_close(sums, also)
    assert also[:, 1:].count_nonzero() == 0


def test_members_are_the_largest_dot_products_in_order_of_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "PIECE", Sizes(1, 1))  # one centroid, or one token, at a time
    torch.manual_seed(0)
    x, centroids = torch.randn(2, 40, 3, 8), F.normalize(torch.randn(3, 6, 8), dim=-1)
    scores = torch.einsum("bthd,hkd->bhkt", F.layer_norm(x, (8,)), centroids)
    taken, sums = kmeans.members(x, centroids, 7)
    assert torch.equal(taken, scores.topk(7).indices.sort().values)
    cluster, also = kmeans.nearest(x, centroids)
    assert torch.equal(cluster, scores.argmax(dim=2))
    torch.testing.assert_close(sums, also)
    one_hot = F.one_hot(cluster, 6).float()
    torch.testing.assert_close(sums, torch.einsum("bhtk,bthd->hkd", one_hot, F.layer_norm(x, (8,))))


@pytest.mark.parametrize("tokens", [40, 37])
def test_a_token_in_no_cluster_gets_zeros_from_routed_heads(tokens: int) -> None:
    """A centroid takes T / n_clusters tokens, rounded up: 10 of 40 and of 37."""
    layer = make(tokens, n_clusters=4, selection="topk")
    layer.centroids.copy_(layer.centroids[:, :1].expand_as(layer.centroids).clone())  # all take the same
    q, v = (torch.randn(1, tokens, 2, 8, dtype=torch.float64) for _ in range(2))
    y = layer.in_clusters(q, q, v, Context(causal=True), clusters.TILES)
    assert (y.abs().sum(dim=-1) == 0).sum(dim=1).tolist() == [[tokens - 10, tokens - 10]]


def test_memberships_do_not_depend_on_autocast() -> None:
    layer = make(64).float()
    x = torch.randn(1, 4096, 2, 8)  # enough for some to lie between two clusters
    plain, taken = (
        kmeans.nearest(x, layer.centroids)[0],
        kmeans.members(x, layer.centroids, 512)[0],
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans.nearest(x, layer.centroids)[0], plain)
        assert torch.equal(kmeans.members(x, layer.centroids, 512)[0], taken)
        for causal in (True, False):
            inputs = torch.randn(1, 64, 32, requires_grad=True)
            layer(inputs, Context(causal=causal)).y.float().sum().backward()
            assert inputs.grad is not None
            assert inputs.grad.isfinite().all()


def trained(activations: str, *, steps: int, causal: bool = True) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(
        ModelSpec.of(Routing, RoutingConfig(decay=0.5, window=8), feed_forward=feed_forward(mult=2)),
        Workload(causal=True, batch_size=2, seq_len=32, d_model=32, heads=4),
        depth=2,
        dropout=0.0,
        vocabulary=11,
        activations=activations,
    ).train()
    optimizer = optimizer_for(model, 1e-2)
    tokens = torch.randint(11, (2, 33))
    for _ in range(steps):
        training_step(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:]), causal=causal)
    return model


@pytest.mark.parametrize("causal", [True, False])
def test_recomputation_does_not_move_centroids_twice(causal: bool) -> None:
    kept, again = (trained(how, steps=3, causal=causal) for how in ("keep", "checkpoint"))
    fresh = trained("keep", steps=0)
    for a, b, start in zip(kept.layers, again.layers, fresh.layers, strict=True):
        torch.testing.assert_close(a.centroids, b.centroids, rtol=0, atol=1e-6)
        assert (a.centroids - start.centroids).abs().max() > 0.1  # type: ignore[operator]
    for p, r in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p, r, rtol=0, atol=1e-6)


def test_a_step_moves_each_centroid_towards_its_members_once() -> None:
    layer = make(40, n_clusters=60, decay=0.9).float()  # more clusters than tokens: some have no member
    x = torch.randn(1, 40, 32)
    start = layer.centroids.clone()
    layer(x, Context(causal=True))
    layer.after_step()
    assert torch.equal(layer.centroids, start)  # nothing is learnt in eval mode
    layer.train()
    layer(x, Context(causal=True))
    sums = layer.sums.clone()
    for again in (torch.randn_like(x), x):
        layer(again, Context(causal=True))
    assert torch.equal(layer.sums, sums)  # the last pass overwrites what others noted
    layer.after_step()
    empty = sums.abs().sum(dim=-1) == 0
    assert 0 < empty.sum() < empty.numel()
    assert torch.equal(layer.centroids[empty], start[empty])
    expected = F.normalize(0.9 * start + 0.1 * F.normalize(sums, dim=-1), dim=-1)
    torch.testing.assert_close(layer.centroids[~empty], expected[~empty])
    moved = layer.centroids.clone()
    layer.after_step()
    assert torch.equal(layer.centroids, moved)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("selection", ["nearest", "topk"])
def test_queries_and_keys_both_move_the_centroids(selection: str, causal: bool) -> None:
    """Algorithm 1 adds up the members among both; where they are shared, they count once."""
    layer = make(40, n_clusters=5, selection=selection, decay=0.5).train()
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    start = layer.centroids.clone()
    layer(x, Context(causal=causal))
    layer.after_step()
    q, _, k = F.linear(x, layer.projections.qkv.weight)[..., 48:].split(16, dim=-1)
    sums = torch.zeros_like(start)
    for rows in (q,) if causal or selection == "nearest" else (q, k):
        tokens = F.layer_norm(rows.unflatten(-1, (2, 8)), (8,))
        nearest = torch.einsum("bthd,hkd->bthk", tokens, start).argmax(-1)
        sums += torch.einsum("bthk,bthd->hkd", F.one_hot(nearest, 5).double(), tokens)
    want = F.normalize(0.5 * start + 0.5 * F.normalize(sums, dim=-1), dim=-1)
    torch.testing.assert_close(layer.centroids, want, rtol=1e-4, atol=1e-4)  # membership sums are float32


def test_centroids_are_saved_and_what_a_pass_notes_is_not() -> None:
    layer = make(40)
    assert "centroids" in layer.state_dict()
    assert "sums" not in layer.state_dict()
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.centroids, layer.centroids)
    assert all(not b.requires_grad for b in layer.buffers())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("selection", "exact"), [("topk", True), ("nearest", False)])
@pytest.mark.parametrize("tokens", [100, 1024, 4000])
def test_dispatched_flops(selection: str, exact: bool, causal: bool, tokens: int) -> None:
    dims = Workload(causal=True, batch_size=2, seq_len=tokens, d_model=64, heads=4)
    # local heads at window ≥ T are exact, so what is left is the routed half
    config = RoutingConfig(selection=selection, window=tokens if exact else 128)
    layer = Routing(config, dims)
    with FakeTensorMode(allow_non_fake_inputs=True), CountFlops() as counter:
        layer(torch.empty(2, tokens, 64), Context(causal=causal))
    flops = layer.cost(replace(dims, causal=causal))
    ratio = gates.cost_ratio(counter.total, flops, layer.flop_overhead_reason)
    if exact:
        assert ratio == pytest.approx(1, abs=0.01)


def test_flops_count_the_pairs_of_one_full_cluster() -> None:
    layer = make(50, n_clusters=1, cluster_window=9, window=5)
    dims = Workload(causal=True, batch_size=1, seq_len=50, d_model=32, heads=4)
    index = torch.arange(50)
    apart = index[:, None] - index
    pairs = 2 * int(((apart >= 0) & (apart < 9)).sum() + ((apart >= 0) & (apart < 5)).sum())
    assert layer.cost(replace(dims, causal=True)).mixing == 8 * (4 * pairs + 2 * 2 * 50)
    assert layer.cost(replace(dims, causal=True)).tokenwise == 2 * 50 * 32 * 32 * 7 // 2


@pytest.mark.parametrize(("selection", "causal"), [("nearest", True), ("topk", False)])
def test_memory_grows_no_faster_than_claimed(selection: str, causal: bool) -> None:
    peaks = []
    for tokens in (2**14, 2**17):
        dims = Workload(causal=True, batch_size=1, seq_len=tokens, d_model=256, heads=4)
        with FakeTensorMode(), LiveStorage() as storage:
            layer = Routing(RoutingConfig(selection=selection), dims)
            x = torch.randn(1, tokens, 256, requires_grad=True)
            layer(x, Context(causal=causal)).y.sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] < 8**1.05 * peaks[0]
    if causal:
        assert peaks[1] < 13 * 2**30 / 8  # 13 GiB at 2²⁰


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("n_clusters", 0),
        ("window", 0),
        ("cluster_window", 0),
        ("decay", 1.0),
        ("decay", -0.1),
        ("selection", "first"),
    ],
)
def test_a_bad_knob_is_refused_by_name(knob: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"{knob}={value!r}: allowed is"):
        RoutingConfig(**{knob: value})  # type: ignore[arg-type]


def test_an_odd_number_of_heads_is_unsupported() -> None:
    dims = Workload(causal=True, batch_size=1, seq_len=8, d_model=24, heads=3)
    assert "heads=3" in (Routing.unsupported(RoutingConfig(), dims, causal=True) or "")


def test_what_no_layer_can_be_is_asked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceMixer, "unsupported", classmethod(lambda cls, *args, causal: "no layer can"))
    assert Routing.unsupported(
        RoutingConfig(), Workload(causal=True, batch_size=1, seq_len=8, d_model=32, heads=4), causal=True
    )


def test_sizes_follow_the_longest_sequence() -> None:
    layer = make(1000)
    assert (layer.clusters, layer.cluster_window) == (32, 32)
    assert layer.config.as_dict()["n_clusters"] is None
    dims = Workload(causal=True, batch_size=1, seq_len=1000, d_model=32, heads=4)
    assert layer.state_bytes(dims) == 2 * 4 * 8 * (2 * 127 + 2 * 32 * 31)
