"""Landmark attention is the paper's grouped softmax, and reads no landmark of an unfinished block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, difference, feed, make_layer, numbers, rotated
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.causality_gate import leak
from bench.measure.gate_failed import GateFailed
from bench.measure.memory import LiveStorage
from variants.attention.dense import Dense, DenseConfig
from variants.attention.landmark import Landmark, LandmarkConfig
from variants.base import Clock, Workload

SMALL: list[dict[str, Any]] = [
    {"block": 4, "top_k": 2},
    {"block": 8, "top_k": 1, "impl": "plain"},
]

HEADS = 3


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS, kv_heads=kv_heads)


def heads_of(layer: Landmark, x: Tensor) -> list[Tensor]:
    """Queries, keys, values and landmark keys of every token: (B, T, H, D) each."""
    dims = layer.dims
    sizes = [dims.inner_dim, dims.key_dim, dims.key_dim]
    weights = [*layer.get_parameter("projections.qkv.weight").split(sizes), layer.landmark.weight]
    q, k, v, marks = (einsum("btc,dc->btd", x, w).unflatten(-1, (-1, dims.head_dim)) for w in weights)
    shared = [t.repeat_interleave(dims.queries_per_key, dim=2) for t in (rotated(k), v, rotated(marks))]
    return [rotated(q), *shared]


def written_out(layer: Landmark, x: Tensor) -> Tensor:
    """Query by query, without a mask: the weights as products of two fractions."""
    q, k, v, marks = heads_of(layer, x)
    block, scale = layer.config.block, layer.dims.head_dim**-0.5
    rows = []
    for b in range(len(x)):
        for t in range(x.shape[1]):
            for h in range(layer.dims.heads):
                own = t // block
                scores = [q[b, t, h] @ marks[b, (i + 1) * block - 1, h] * scale for i in range(own)]
                ranked = sorted(((-score.item(), i) for i, score in enumerate(scores)))
                best = [i for _, i in ranked[: layer.config.top_k]]
                near = k[b, own * block : t + 1, h] @ q[b, t, h] * scale
                total = near.exp().sum() + sum(scores[i].exp() for i in best)
                y = near.exp() @ v[b, own * block : t + 1, h] / total
                for i in best:
                    inside = slice(i * block, (i + 1) * block)
                    far = (k[b, inside, h] @ q[b, t, h] * scale).exp()
                    y = y + scores[i].exp() / total * (far @ v[b, inside, h]) / far.sum()
                rows.append(y)
    mixed = torch.stack(rows).view(*x.shape[:2], -1)
    return einsum("btc,dc->btd", mixed, layer.get_parameter("projections.out.weight"))


@settings(deadline=None, max_examples=6)
@given(
    tokens=st.integers(1, 30),
    block=st.integers(1, 9),
    top_k=st.integers(1, 5),
    kv_heads=st.sampled_from([None, 1]),
    impl=st.sampled_from(["fused", "plain"]),
)
@example(tokens=1, block=4, top_k=3, kv_heads=None, impl="fused")
@example(tokens=29, block=4, top_k=2, kv_heads=1, impl="fused")
@example(tokens=29, block=4, top_k=9, kv_heads=None, impl="plain")
def test_equals_the_equations_of_the_paper(
    tokens: int, block: int, top_k: int, kv_heads: int | None, impl: Any
) -> None:
    """With top_k = 9 these are all blocks, as in the paper's training."""
    layer = make_layer(
        Landmark, LandmarkConfig(block=block, top_k=top_k, impl=impl), dims_of(tokens, 1, kv_heads)
    )
    assert isinstance(layer, Landmark)
    x = numbers(1, tokens, 12)
    assert_same(lambda: feed(layer, x, causal=True), lambda: written_out(layer, x), [x, *layer.parameters()])


def grouped(layer: Landmark, x: Tensor) -> Tensor:
    """The grouped softmax over everything, by one log-weight for each pair of tokens."""
    q, k, v, marks = heads_of(layer, x)
    block, tokens = layer.config.block, x.shape[1]
    full = tokens // block * block
    scores = einsum("bihd,bjhd->bhij", q, k) * layer.dims.head_dim**-0.5
    of_marks = einsum("bihd,bjhd->bhij", q, marks[:, block - 1 :: block]) * layer.dims.head_dim**-0.5
    inside = F.log_softmax(scores[..., :full].unflatten(-1, (-1, block)), -1) + of_marks[..., None]
    log_weight = torch.cat([inside.flatten(-2), scores[..., full:]], dim=-1)
    token = torch.arange(tokens)
    same, past = token // block == token[:, None] // block, token // block < token[:, None] // block
    log_weight = torch.where(same, scores, log_weight)
    allowed = same & (token <= token[:, None]) | past
    weights = log_weight.masked_fill(~allowed, float("-inf")).softmax(-1)
    y = einsum("bhij,bjhd->bihd", weights, v)
    return einsum("btc,dc->btd", y.flatten(2), layer.get_parameter("projections.out.weight"))


@pytest.mark.parametrize("impl", ["fused", "plain"])
def test_all_blocks_are_the_grouped_softmax_over_everything(impl: Any) -> None:
    layer = make_layer(Landmark, LandmarkConfig(block=8, top_k=6, impl=impl), dims_of(45, 2))
    assert isinstance(layer, Landmark)
    x = numbers(2, 45, 12)
    assert_same(lambda: feed(layer, x, causal=True), lambda: grouped(layer, x), [x, *layer.parameters()])


def test_blocks_of_one_token_whose_landmarks_are_the_keys_are_dense() -> None:
    """Then a landmark's weight is that of its only key."""
    layer = make_layer(Landmark, LandmarkConfig(block=1, top_k=23), dims_of(23))
    dense = make_layer(Dense, DenseConfig(), dims_of(23))
    assert isinstance(layer, Landmark)
    weights = {name: value for name, value in layer.state_dict().items() if name != "landmark.weight"}
    dense.load_state_dict(weights)
    with torch.no_grad():
        layer.landmark.weight.copy_(layer.projections.qkv.weight[12:24])
    x = numbers(2, 23, 12)
    assert_same(lambda: feed(layer, x, causal=True), lambda: feed(dense, x, causal=True), [x])


def test_one_block_is_dense() -> None:
    layer = make_layer(Landmark, LandmarkConfig(block=50), dims_of(43))
    dense = make_layer(Dense, DenseConfig(), dims_of(43))
    dense.load_state_dict({n: v for n, v in layer.state_dict().items() if n != "landmark.weight"})
    x = numbers(2, 43, 12)
    assert_same(lambda: feed(layer, x, causal=True), lambda: feed(dense, x, causal=True), [x])


@torch.no_grad()
def test_decoding_reads_the_selected_blocks_alone() -> None:
    """Token by token, with a cache in which all other keys and values are NaN."""
    tokens, block = 27, 4
    layer = make_layer(Landmark, LandmarkConfig(block=block, top_k=2), dims_of(tokens, kv_heads=1)).eval()
    assert isinstance(layer, Landmark)
    x = numbers(2, tokens, 12).detach()
    want = written_out(layer, x)
    q, _, _, marks = (t.transpose(1, 2) for t in heads_of(layer, x))
    picks = layer._select(q, marks[:, :, block - 1 :: block])
    clock = Clock()
    state = layer.init_state(2, tokens, clock=clock, dtype=torch.float64)
    for position in range(tokens):
        kept = state.keys.clone(), state.values.clone()
        of_block = torch.arange(tokens) // block
        read = (picks[:, :, position, :, None] == of_block).any((1, 2)) | (of_block == position // block)
        for part in (state.keys, state.values):
            part.masked_fill_(~read[:, None, :, None], torch.nan)
        y = layer.step(x[:, position : position + 1], state)
        assert difference(y, want[:, position : position + 1]) <= EXACT
        for part, before in zip((state.keys, state.values), kept, strict=True):
            part[:, :, :position] = before[:, :, :position]
        clock.advance(1)


def leak_of(variant: type[Landmark]) -> float:
    dims = replace(dims_of(96, 2), d_model=24)
    config = LandmarkConfig(block=4, top_k=2)
    return leak(variant, config, dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)


def test_the_gate_sees_a_landmark_of_a_later_block() -> None:
    """Each block has the landmark of the next one, which later tokens decide."""

    class Ahead(Landmark):
        def _landmarks(self, x: Tensor, *given: Any) -> Tensor:
            return super()._landmarks(x, *given).roll(-1, dims=2)

    assert leak_of(Landmark) <= gates.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        leak_of(Ahead)


@pytest.mark.parametrize("ahead", [1, 100])
def test_the_gate_sees_a_selection_by_unfinished_blocks(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The own block, or later ones, take part in the selection; a past block is read in their place."""

    def leaky(q: Tensor, landmarks: Tensor, block: int, count: int, device_type: str, **_: int) -> Tensor:
        own = torch.arange(q.shape[2])[:, None] // block
        there = torch.arange(landmarks.shape[2]) < own + ahead
        best = (q @ landmarks.mT).masked_fill(~there, float("-inf")).topk(1).indices
        first = torch.minimum(best, (own - 1).clamp(min=0))
        return torch.cat([first, (first + 1) % own.clamp(min=1)], dim=-1)[..., :count]

    monkeypatch.setattr("variants.attention.landmark.best_blocks", leaky)
    with pytest.raises(GateFailed, match="causality gate"):
        leak_of(Landmark)


def test_memory_grows_with_the_sequence_not_with_the_gathered_keys() -> None:
    """Twice the tokens need at most twice the memory."""
    peaks = []
    for tokens in (2048, 4096):
        layer = Landmark(LandmarkConfig(block=16), dims_of(tokens))
        x = torch.randn(1, tokens, 12, requires_grad=True)
        with LiveStorage() as storage:
            feed(layer, x, causal=True).sum().backward()
        peaks.append(storage.peak)
    assert peaks[1] <= 2.1 * peaks[0]
