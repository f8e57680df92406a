"""A learnt number in the denominator, against the logsumexp, a further token, dense attention and leaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import (
    EXACT,
    assert_same,
    difference,
    drawn,
    everything,
    feed,
    make_layer,
    numbers,
    refer,
    rotated,
)
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.dense import Dense, DenseConfig
from variants.attention.learnt_sink import LearntSink, LearntSinkConfig
from variants.base import Clock, Context, Workload
from variants.ops.patterns import masks
from variants.ops.patterns.masks import Rule

SMALL: list[dict[str, Any]] = [{"window": 6}, {"impl": "sdpa"}]

CPU = torch.device("cpu")
both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(
        causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=2, kv_heads=kv_heads, element_bytes=8
    )


def make(tokens: int, sinks: list[float], kv_heads: int | None = None, **knobs: Any) -> LearntSink:
    layer = make_layer(LearntSink, LearntSinkConfig.of(knobs), dims_of(tokens, 2, kv_heads))
    assert isinstance(layer, LearntSink)
    with torch.no_grad():
        layer.sink.copy_(torch.tensor(sinks))
    return layer


def by_logsumexp(layer: LearntSink, x: Tensor, allowed: Tensor) -> Tensor:
    """The output of softmax attention, times sigmoid(logsumexp − σ)."""
    weights = layer.get_parameter("projections.qkv.weight").chunk(3)
    q, k, v = (einsum("btc,dc->btd", x, w).unflatten(-1, (2, -1)) for w in weights)
    scores = einsum("bihd,bjhd->bhij", rotated(q), rotated(k)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    y = einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    less = (scores.logsumexp(-1) - layer.sink[:, None]).sigmoid()  # (B, H, T)
    y = (y * less.transpose(1, 2)[..., None]).flatten(2)
    return einsum("btc,dc->btd", y, layer.get_parameter("projections.out.weight"))


@both_directions
@pytest.mark.parametrize("impl", ["fused", "sdpa"])
@settings(deadline=None, max_examples=8)
@given(tokens=st.integers(1, 50), sinks=st.lists(st.floats(-6, 6), min_size=2, max_size=2))
@example(tokens=1, sinks=[0.0, 30.0])
@example(tokens=33, sinks=[-40.0, 3.0])
def test_weights_that_are_lost_to_the_sink(causal: bool, impl: str, tokens: int, sinks: list[float]) -> None:
    """Outputs and gradients, also of the sinks."""
    layer, x = make(tokens, sinks, impl=impl), numbers(2, tokens, 16)
    allowed = everything(tokens, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_logsumexp(layer, x, allowed),
        [x, *layer.parameters()],
    )


@both_directions
@pytest.mark.parametrize("impl", ["fused", "plain"])
@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_windows(causal: bool, impl: str, tokens: int) -> None:
    layer, x = make(tokens, [0.5, -1.5], impl=impl, window=6), numbers(2, tokens, 16)
    allowed = drawn(tokens, lambda i, j: abs(i - j) < 6 and (j <= i or not causal))
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: by_logsumexp(layer, x, allowed),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("impl", ["fused", "sdpa"])
def test_a_sink_that_is_never_read_leaves_dense_attention(impl: str) -> None:
    layer, dense = make(40, [-1e4, -1e4], impl=impl), make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    dense.load_state_dict({name: w for name, w in layer.state_dict().items() if name != "sink"})
    x = numbers(2, 40, 16)
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: feed(dense, x, causal=True),
        [x, *layer.projections.parameters()],
        [x, *dense.parameters()],
    )


def test_the_gradient_of_a_sink_is_a_finite_difference() -> None:
    layer, x = make(20, [0.3, -0.7]), numbers(2, 20, 16).detach()
    (got,) = torch.autograd.grad(feed(layer, x, causal=True).square().sum(), layer.sink)
    for head in range(2):
        sums = []
        for change in (1e-5, -1e-5):
            moved = layer.sink.detach().clone()
            moved[head] += change
            given_sinks = make(20, moved.tolist())
            given_sinks.load_state_dict({**layer.state_dict(), "sink": moved})
            sums.append(feed(given_sinks, x, causal=True).square().sum())
        assert abs(got[head] - (sums[0] - sums[1]) / 2e-5) <= 1e-7 * abs(got[head])


@pytest.mark.parametrize("window", [0, 6])
def test_shared_keys(window: int) -> None:
    """One head of keys for two of queries with their own sinks: the reference, and decoding."""
    layer, x = make(40, [1.5, -0.5], kv_heads=1, window=window), numbers(2, 40, 16)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: refer(layer, x, causal=True), [x, *layer.parameters()]
    )
    state = layer.init_state(2, 40, clock=Clock(), dtype=torch.float64)
    assert state.nbytes == layer.decoding_bytes(dims_of(40, 2, 1))
    outputs = []
    with torch.no_grad():
        for tokens in x.split([1, 9, 1, 1, 1, 12, 15], dim=1):
            outputs.append(layer(tokens, Context(causal=True), state).y)
            state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT


def test_a_sink_that_sees_later_scores_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak: a window that is open to both sides."""
    config = LearntSinkConfig(window=5)
    assert gates.leak(LearntSink, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE

    def both_sides(self: LearntSink, seq_len: int, *, causal: bool) -> Rule:
        return masks.Window(5)

    monkeypatch.setattr(LearntSink, "mask", both_sides)
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(LearntSink, config, dims_of(70, 2), 2, CPU)
