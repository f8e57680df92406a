"""Adaptive spans against dense attention, a written-out sum, finite differences, and what training does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import assert_same, difference, dims_for, everything, feed, make_layer, numbers, oracle, refer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from bench.measure.memory import LiveStorage
from variants.attention.adaptive_span import AdaptiveSpan, AdaptiveSpanConfig
from variants.base import Context, Workload
from variants.ops.patterns.soft_window import block_size, keys_before, soft_window

SMALL: list[dict[str, Any]] = [
    {"initial_span": 9, "ramp": 4, "max_span": 40},
    {"initial_span": 0, "ramp": 1, "max_span": 5},
    {"initial_span": 30, "ramp": 16, "max_span": 30},
]

CPU = torch.device("cpu")


def make(tokens: int, spans: list[float] | None = None, **knobs: Any) -> AdaptiveSpan:
    """A layer whose heads have these spans, in tokens."""
    layer = make_layer(AdaptiveSpan, AdaptiveSpanConfig(**knobs), dims_for(tokens, 2))
    assert isinstance(layer, AdaptiveSpan)
    if spans:
        with torch.no_grad():
            layer.span.copy_(torch.tensor(spans) / layer.config.max_span)
        layer.note_spans()
    return layer


def test_a_span_of_the_whole_sequence_is_dense_attention() -> None:
    tokens = 50
    layer = make(tokens, initial_span=50, max_span=64)
    x = numbers(2, tokens, layer.dims.d_model)
    given = [x, *layer.projections.parameters()]
    dense = everything(tokens, causal=True)
    assert_same(lambda: feed(layer, x, causal=True), lambda: oracle(layer, x, dense), given)


@pytest.mark.parametrize("spans", [[0.0, 0.0], [3.0, 17.5], [40.0, 0.25], [12.3, 12.3]])
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_heads_have_spans_of_their_own(tokens: int, spans: list[float]) -> None:
    """Outputs and gradients, also of the spans."""
    layer = make(tokens, spans, ramp=5, max_span=40)
    x = numbers(2, tokens, layer.dims.d_model)
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: refer(layer, x, causal=True),
        [x, *layer.parameters()],
    )


def test_weights_fall_over_the_ramp() -> None:
    """Equal scores: weights are the factors over their sum."""
    layer = make(30, [6.0, 6.0], ramp=4, max_span=10)
    with torch.no_grad():
        layer.projections.qkv.weight[:32] = 0
        layer.projections.out.weight.copy_(torch.eye(16))
    x = numbers(1, 30, 16).detach()
    y = layer(x, Context(causal=True)).y
    values = x @ layer.projections.qkv.weight[32:].T
    factors = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25], dtype=torch.float64)  # of distances 0 … 9
    want = (values[:, 20 - 9 : 21].flip(1) * factors[:, None]).sum(1) / factors.sum()
    assert difference(y[:, 20], want) <= 1e-6  # the span is a float32 number of the knob


def test_the_gradient_of_a_span_is_a_finite_difference() -> None:
    layer = make(25, [6.4, 11.7], ramp=5, max_span=20)
    x = numbers(2, 25, 16).detach()
    (got,) = torch.autograd.grad(layer(x, Context(causal=True)).y.sum(), layer.span)
    for head in range(2):
        found = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                layer.span[head] += step
                found.append(layer(x, Context(causal=True)).y.sum())
                layer.span[head] -= step
        torch.testing.assert_close(got[head], (found[0] - found[1]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("tokens", "extent"), [(1, 1), (40, 8), (41, 8), (9, 8), (100, 30), (64, 64)])
def test_the_window_equals_biased_attention(tokens: int, extent: int) -> None:
    q, k, v = (numbers(2, 3, tokens, 4, seed=seed) for seed in (1, 2, 3))
    by_distance = numbers(3, extent, seed=4)
    block = block_size(extent, tokens)

    def table(queries: Tensor, keys: Tensor) -> Tensor:
        distance = queries[:, None] - keys
        inside = (distance >= 0) & (distance < extent)
        return by_distance[:, distance.clamp(0, extent - 1)].masked_fill(~inside, float("-inf"))

    def windows() -> Tensor:
        before = keys_before(extent, block)
        here = table(torch.arange(block) + before, torch.arange(before + block))
        return soft_window(q, k, v, here, device_type="cpu")

    def dense() -> Tensor:
        scores = q @ k.mT / 2 + table(torch.arange(tokens), torch.arange(tokens))
        return scores.softmax(-1) @ v

    assert_same(windows, dense, [q, k, v, by_distance])


def test_both_losses_train_the_span_and_it_stays_within_its_bounds() -> None:
    layer = make(30, [5.0, 15.0], ramp=4, max_span=20, penalty=0.25)
    x = numbers(2, 30, 16).detach()
    out = layer(x, Context(causal=True))
    assert out.aux_loss is not None
    torch.testing.assert_close(out.aux_loss.item(), 0.25 * 10.0)
    (of_task,) = torch.autograd.grad(out.y.sum(), layer.span, retain_graph=True)
    (of_penalty,) = torch.autograd.grad(out.aux_loss, layer.span)
    assert of_task.all()
    torch.testing.assert_close(of_penalty, torch.full_like(of_penalty, 0.25 * 20 / 2))
    with torch.no_grad():
        layer.span.copy_(torch.tensor([-0.5, 1.5]))
    layer.after_step()
    assert layer.span.tolist() == [0, 1]
    assert layer.spans == (0.0, 20.0)
    assert layer.reaches == (4, 24)


def test_the_cost_and_the_state_are_those_of_the_spans() -> None:
    work = replace(dims_for(100), causal=True)
    short, long = (make(100, spans, ramp=4, max_span=50) for spans in ([2.0, 2.0], [2.0, 46.0]))
    assert short.cost(work).parts["attention"] < long.cost(work).parts["attention"]
    pairs = sum(min(t + 1, 6) + min(t + 1, 50) for t in range(100))
    assert long.cost(work).parts["attention"] == 4 * work.head_dim * pairs
    assert long.state_bytes(work) == 2 * 4 * work.head_dim * (5 + 49)
    assert long.attention_mask(100, causal=True).sum(1).max() == 50


def test_loaded_weights_bring_their_spans() -> None:
    layer, other = make(60, [3.0, 33.0], max_span=40, ramp=4), make(60, max_span=40, ramp=4)
    other.load_state_dict(layer.state_dict())
    assert other.spans == layer.spans
    x = numbers(2, 60, 16)
    assert difference(feed(other, x, causal=True), feed(layer, x, causal=True)) == 0
    with FakeTensorMode():  # no numbers: spans stay what they were
        fake = AdaptiveSpan(AdaptiveSpanConfig(initial_span=7), dims_for(60))
        fake.after_step()
    assert fake.spans == (7.0, 7.0)


class Symmetric(AdaptiveSpan):
    """A planted leak: later tokens fade as earlier ones do."""

    def _fading(self, distance: Tensor, heads: slice) -> Tensor:
        return super()._fading(distance.abs(), heads)


def leak_of(variant: type[AdaptiveSpan]) -> float:
    with torch.random.fork_rng():
        return gates.leak(variant, AdaptiveSpanConfig(), dims_for(140, 2), 2, CPU)


def test_the_gate_finds_a_window_to_both_sides() -> None:
    assert leak_of(AdaptiveSpan) <= gates.LEAK_TOLERANCE
    with pytest.raises(GateFailed, match="causality gate"):
        leak_of(Symmetric)


def test_memory_is_that_of_a_window() -> None:
    """A million tokens of one layer need less than the local layers' mark, 14 GiB."""
    dims = Workload(causal=True, batch_size=1, seq_len=2**20, d_model=256, heads=4)
    with FakeTensorMode(), LiveStorage() as storage:
        layer = AdaptiveSpan(AdaptiveSpanConfig(initial_span=96), dims)
        x = torch.randn(1, dims.seq_len, 256, requires_grad=True)
        layer(x, Context(causal=True)).y.sum().backward()
    assert storage.peak < 18 * 2**30
