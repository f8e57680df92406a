"""Attention sinks against loops over the tokens of a cache, dense attention, and planted leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import EXACT, assert_same, difference, drawn, feed, make_layer, numbers, oracle, refer, rotated
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.dense import Dense, DenseConfig
from variants.attention.longformer import Longformer, LongformerConfig
from variants.attention.streaming_llm import StreamingLLM, StreamingLLMConfig
from variants.base import Clock, Context, Workload
from variants.ops.patterns.masks import Window
from variants.ops.patterns.regions import Region

SMALL: list[dict[str, Any]] = [
    {"window": 7, "sinks": 3},
    {"window": 1, "sinks": 9, "positions": "text"},
]

CPU = torch.device("cpu")


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(
        causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=2, kv_heads=kv_heads, element_bytes=8
    )


def make(tokens: int, kv_heads: int | None = None, **knobs: Any) -> StreamingLLM:
    layer = make_layer(StreamingLLM, StreamingLLMConfig.of(knobs), dims_of(tokens, 2, kv_heads))
    assert isinstance(layer, StreamingLLM)
    return layer


def from_caches(layer: StreamingLLM, x: Tensor, sinks: int, window: int) -> Tensor:
    """Each query beside the tokens that a cache holds for it, with positions counted in this cache."""
    weights = layer.get_parameter("projections.qkv.weight").chunk(3)
    outputs = []
    for query in range(x.shape[1]):
        cache = [j for j in range(query + 1) if j < sinks or query - j < window]
        q, k, v = (einsum("btc,dc->btd", x[:, cache], w).unflatten(-1, (2, -1)) for w in weights)
        scores = einsum("bhd,bjhd->bhj", rotated(q)[:, -1], rotated(k)) * q.shape[-1] ** -0.5
        weights_of = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(einsum("bhj,bjhd->bhd", weights_of, v).flatten(1))
    return einsum("btc,dc->btd", torch.stack(outputs, 1), layer.get_parameter("projections.out.weight"))


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 50), window=st.integers(1, 20), sinks=st.integers(1, 8))
@example(tokens=1, window=1, sinks=1)
@example(tokens=3, window=2, sinks=5)
@example(tokens=40, window=1, sinks=2)
def test_positions_are_counted_in_the_cache(tokens: int, window: int, sinks: int) -> None:
    layer = make(tokens, window=window, sinks=sinks)
    x = numbers(2, tokens, 16)
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: from_caches(layer, x, sinks, window),
        [x, *layer.parameters()],
    )


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 60), window=st.integers(1, 24), sinks=st.integers(1, 9))
@example(tokens=60, window=8, sinks=4)
def test_with_positions_of_the_text_it_is_a_mask(tokens: int, window: int, sinks: int) -> None:
    layer = make(tokens, window=window, sinks=sinks, positions="text")
    x = numbers(2, tokens, 16)
    allowed = drawn(tokens, lambda i, j: j <= i and (j < sinks or i - j < window))
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )
    assert torch.equal(layer.attention_mask(tokens, causal=True), allowed)
    assert layer.pairs(tokens, causal=True) == 2 * int(allowed.sum())


@pytest.mark.parametrize("knobs", [{"window": 40}, {"window": 1, "sinks": 40, "positions": "text"}])
def test_a_cache_of_the_whole_sequence_is_dense_attention(knobs: dict[str, Any]) -> None:
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    layer, x = make(40, **knobs), numbers(1, 40, 16)
    dense.load_state_dict(layer.state_dict())
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: feed(dense, x, causal=True),
        [x, *layer.parameters()],
        [x, *dense.parameters()],
    )


def test_no_distance_is_longer_than_in_training() -> None:
    """Far from the start, the same window reads the same: its output does not depend on its place."""
    layer = make(90, window=10, sinks=2)
    x = numbers(1, 90, 16).detach()
    x[:, 70:80] = x[:, 40:50]
    y = feed(layer, x, causal=True)
    assert difference(y[:, 79], y[:, 49]) <= EXACT
    text = make(90, window=10, sinks=2, positions="text")
    text.load_state_dict(layer.state_dict())
    y = feed(text, x, causal=True)
    assert difference(y[:, 79], y[:, 49]) > 1e-3


def test_without_the_first_tokens_it_is_a_window() -> None:
    """Tokens whose scores with the sinks are very low read what a window reads."""
    layer = make(50, window=6, sinks=1)
    window = make_layer(Longformer, LongformerConfig(window=(6,)), dims_of(50))
    window.load_state_dict(layer.state_dict())
    q, k, v = (t.detach() for t in layer.projections.split(numbers(1, 50, 16)))
    k[:, :, 0] = 0
    without = window.run_impl(window, q, k, v, True)
    k[:, :, 0, 0] = -1e9 * q[:, :, 30, 0].sign()
    k[:, :, 0, 1:] = 0
    scores = torch.full((1, 2, 50, 1), -1e9, dtype=q.dtype)
    layer._scores_of_sinks = lambda *_: scores  # type: ignore[method-assign]
    assert difference(layer.run_impl(layer, q, k, v, None)[:, :, 7:], without[:, :, 7:]) <= EXACT


@pytest.mark.parametrize("positions", ["cache", "text"])
def test_shared_keys(positions: str) -> None:
    """One head of keys for two of queries: the reference, and the cache of decoding."""
    layer, x = make(40, kv_heads=1, window=7, sinks=3, positions=positions), numbers(2, 40, 16)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: refer(layer, x, causal=True), [x, *layer.parameters()]
    )
    state = layer.init_state(2, 40, clock=Clock(), dtype=torch.float64)
    assert state.nbytes == layer.decoding_bytes(dims_of(40, 2, 1)) == 2 * 2 * 9 * 8 * 8
    outputs = []
    with torch.no_grad():
        for tokens in x.split([2, 9, 1, 1, 1, 12, 14], dim=1):
            outputs.append(layer(tokens, Context(causal=True), state).y)
            state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT


def test_decoding_keeps_the_sinks_and_the_window() -> None:
    """Endless text: the state of a million tokens is that of some hundred."""
    layer, one, million = make(8), dims_of(260), dims_of(2**20)
    assert layer.decoding_bytes(one) == layer.decoding_bytes(million)
    state = layer.init_state(1, 2**20, clock=Clock(), dtype=torch.float64)
    assert state.nbytes == 2 * 16 * (256 - 1 + 4) * 8 == layer.decoding_bytes(million)


def test_a_window_that_reads_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak: the window has both sides."""

    def both_sides(self: StreamingLLM, seq_len: int, *, causal: bool) -> tuple[Region, ...]:
        return (Region(rule=Window(self.config.window), heads=(0, self.dims.heads)),)

    config = StreamingLLMConfig(window=5, sinks=4)
    assert gates.leak(StreamingLLM, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE
    monkeypatch.setattr(StreamingLLM, "regions", both_sides)
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(StreamingLLM, config, dims_of(70, 2), 2, CPU)
