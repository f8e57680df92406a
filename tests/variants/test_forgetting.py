"""Forgetting attention: sums of gates written out, gates that keep or drop everything, and large sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, everything, feed, make_layer, numbers, softmax_attention
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.forgetting import Forgetting, ForgettingConfig
from variants.base import Clock, Context, Workload
from variants.ops import row_blocks
from variants.ops.tile_size import Sizes

CPU = torch.device("cpu")


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=2, element_bytes=8)


def make(tokens: int, biases: tuple[float, float] = (0.5, 3.0)) -> Forgetting:
    layer = make_layer(Forgetting, ForgettingConfig(), dims_of(tokens, 2))
    assert isinstance(layer, Forgetting)
    with torch.no_grad():
        layer.gate.bias.copy_(torch.tensor(biases))
    return layer


def split(layer: Forgetting, x: Tensor) -> list[Tensor]:
    weights = layer.get_parameter("projections.qkv.weight").chunk(3)
    return [einsum("btc,dc->btd", x, w).unflatten(-1, (2, -1)) for w in weights]


def by_products(layer: Forgetting, x: Tensor) -> Tensor:
    """Weights are e^score times the product of the gates after the key, up to the query."""
    q, k, v = split(layer, x)
    logits = einsum("btc,hc->bth", x, layer.gate.weight) + layer.gate.bias
    forget = 1 / (1 + torch.exp(-logits))
    kept = torch.ones(len(x), 2, 0, dtype=x.dtype)
    rows = []
    for token in range(x.shape[1]):
        kept = torch.cat([kept * forget[:, token, :, None], torch.ones(len(x), 2, 1, dtype=x.dtype)], dim=-1)
        scores = einsum("bhd,bjhd->bhj", q[:, token], k[:, : token + 1]) / math.sqrt(8)
        weights = scores.exp() * kept
        weights = weights / weights.sum(-1, keepdim=True)
        rows.append(einsum("bhj,bjhd->bhd", weights, v[:, : token + 1]).flatten(1))
    return einsum("bte,ce->btc", torch.stack(rows, 1), layer.get_parameter("projections.out.weight"))


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_weights_are_products_of_gates(tokens: int) -> None:
    """Outputs and gradients, also of the gates."""
    layer, x = make(tokens), numbers(2, tokens, 16)
    assert_same(lambda: feed(layer, x, causal=True), lambda: by_products(layer, x), [x, *layer.parameters()])


def test_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(33), numbers(2, 33, 16)
    for rows, scores in ((8, 1), (10, 2**20), (7, 700), (1, 100)):
        monkeypatch.setattr(row_blocks, "ROWS", Sizes(cpu=rows, accelerator=rows))
        monkeypatch.setattr(row_blocks, "SCORES", Sizes(cpu=scores, accelerator=scores))
        assert_same(
            lambda: feed(layer, x, causal=True), lambda: by_products(layer, x), [x, *layer.parameters()]
        )


def dense(layer: Forgetting, x: Tensor) -> Tensor:
    """Causal softmax attention without positions."""
    y = softmax_attention(*split(layer, x), everything(x.shape[1], causal=True))
    return einsum("bte,ce->btc", y.flatten(2), layer.get_parameter("projections.out.weight"))


def test_open_gates_leave_dense_attention_without_positions() -> None:
    layer, x = make(40, (60.0, 60.0)), numbers(2, 40, 16)
    assert_same(
        lambda: feed(layer, x, causal=True),
        lambda: dense(layer, x),
        [x, *layer.projections.parameters()],
    )


def test_a_closed_gate_begins_a_new_sequence() -> None:
    """What comes before a token whose gates are 0 is forgotten, whatever stands there."""
    layer, x = make(40, (60.0, 60.0)), numbers(1, 40, 16).detach()
    x[..., 0] = 0
    x[:, 25, 0] = -1
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, 0] = 1e4
    y = feed(layer, x, causal=True)
    assert difference(y[:, 25:], dense(layer, x[:, 25:])) <= EXACT
    assert difference(y[:, :25], dense(layer, x[:, :25])) <= EXACT


def test_constant_gates_are_a_slope_of_the_distance() -> None:
    """ALiBi: each head has its own slope, log f."""
    layer, x = make(40), numbers(1, 40, 16).detach()
    with torch.no_grad():
        layer.gate.weight.zero_()
    q, k, v = split(layer, x)
    scores = einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    slopes = torch.nn.functional.logsigmoid(layer.gate.bias.detach())
    distance = torch.arange(40)[:, None] - torch.arange(40)
    scores = scores + slopes[:, None, None] * distance
    weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
    y = einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    want = einsum("bte,ce->btc", y, layer.get_parameter("projections.out.weight"))
    assert difference(feed(layer, x, causal=True), want) <= EXACT


def test_large_sums_do_not_round_near_differences() -> None:
    """After 1,500 tokens b is −1,000 and more; float32 outputs are those of float64 all the same."""
    layer, x = make(1500, (0.0, -1.0)), numbers(1, 1500, 16).detach()
    want = feed(layer, x, causal=True)
    assert layer._log_gates(x).sum(-1).max() < -1000
    got = feed(layer.float(), x.float(), causal=True).double()
    assert difference(got, want) <= 1e-5


def test_decoding() -> None:
    layer, x = make(40), numbers(2, 40, 16)
    state = layer.init_state(2, 40, clock=Clock(), dtype=torch.float64)
    assert state.nbytes == layer.decoding_bytes(dims_of(40, 2))
    outputs = []
    with torch.no_grad():
        for tokens in x.split([9, 1, 1, 1, 12, 16], dim=1):
            outputs.append(layer(tokens, Context(causal=True), state).y)
            state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT


def test_a_gate_of_the_next_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak."""
    log_gates: Any = Forgetting._log_gates
    config = ForgettingConfig()
    assert gates.leak(Forgetting, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE
    monkeypatch.setattr(Forgetting, "_log_gates", lambda self, x: log_gates(self, x).roll(-1, -1))
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(Forgetting, config, dims_of(70, 2), 2, CPU)
