"""The gate of attention's outputs: half, open and closed, and by head as a special case of by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, everything, feed, make_layer, numbers, oracle, refer
from torch import Tensor, einsum

from bench.measure import gates
from bench.measure.gate_failed import GateFailed
from variants.attention.dense import Dense, DenseConfig
from variants.attention.gated_attention import GatedAttention, GatedAttentionConfig
from variants.base import Clock, Context, Workload

SMALL: list[dict[str, Any]] = [{"gate": "head"}]

CPU = torch.device("cpu")
both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1, kv_heads: int | None = None) -> Workload:
    return Workload(
        causal=True, batch_size=batch, seq_len=tokens, d_model=16, heads=2, kv_heads=kv_heads, element_bytes=8
    )


def make(tokens: int, kv_heads: int | None = None, **knobs: Any) -> GatedAttention:
    layer = make_layer(GatedAttention, GatedAttentionConfig.of(knobs), dims_of(tokens, 2, kv_heads))
    assert isinstance(layer, GatedAttention)
    return layer


@both_directions
@pytest.mark.parametrize("gate", ["element", "head"])
def test_a_gate_of_zeros_halves_dense_attention(causal: bool, gate: str) -> None:
    layer, x = make(30, gate=gate), numbers(2, 30, 16)
    with torch.no_grad():
        layer.gate.weight.zero_()
    allowed = everything(30, causal=causal)
    assert_same(
        lambda: 2 * feed(layer, x, causal=causal),
        lambda: oracle(layer, x, allowed),
        [*layer.projections.parameters()],
    )


def test_a_gate_can_be_open_or_closed() -> None:
    """A channel that is 1 in all tokens opens one head and closes the other."""
    layer, dense = make(20, gate="head"), make_layer(Dense, DenseConfig(), dims_of(20), seed=1)
    x = numbers(1, 20, 16).detach()
    x[..., 0] = 1
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[:, 0] = torch.tensor([40.0, -40.0])
        dense.load_state_dict({k: w for k, w in layer.state_dict().items() if not k.startswith("gate")})
        dense.get_parameter("projections.out.weight")[:, 8:] = 0
    assert difference(feed(layer, x, causal=True), feed(dense, x, causal=True).detach()) <= EXACT


def by_loops(layer: GatedAttention, x: Tensor) -> Tensor:
    """The gate channel by channel, before the output projection of dense attention."""
    dense = make_layer(Dense, DenseConfig(impl="naive"), dims_of(x.shape[1]))
    weights = {k: w for k, w in layer.state_dict(keep_vars=True).items() if not k.startswith("gate")}
    weights["projections.out.weight"] = torch.eye(16, dtype=x.dtype)
    y = torch.func.functional_call(dense, weights, (x, Context(causal=True))).y
    out = layer.get_parameter("projections.out.weight")
    total = torch.zeros_like(x)
    for channel in range(16):
        row = channel if layer.config.gate == "element" else channel // 8
        gate = 1 / (1 + torch.exp(-einsum("btc,c->bt", x, layer.gate.weight[row])))
        total = total + (gate * y[..., channel])[..., None] * out[:, channel]
    return total


@pytest.mark.parametrize("gate", ["element", "head"])
def test_each_channel_has_the_gate_of_its_own_token(gate: str) -> None:
    layer, x = make(25, gate=gate), numbers(2, 25, 16)
    assert_same(lambda: feed(layer, x, causal=True), lambda: by_loops(layer, x), [x, *layer.parameters()])


def test_by_head_is_by_element_with_equal_rows() -> None:
    head, element = make(25, gate="head"), make(25)
    x = numbers(2, 25, 16).detach()
    rows = head.gate.weight.detach().repeat_interleave(8, dim=0)
    element.load_state_dict({**head.state_dict(), "gate.weight": rows})
    assert difference(feed(element, x, causal=True), feed(head, x, causal=True)) <= EXACT


@pytest.mark.parametrize(("gate", "more"), [("element", 16 * 16), ("head", 16 * 2)])
def test_parameters_that_the_gate_adds(gate: str, more: int) -> None:
    dense = make_layer(Dense, DenseConfig(), dims_of(8))
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (make(8, gate=gate), dense)]
    assert sizes[0] - sizes[1] == more


def test_shared_keys() -> None:
    layer, x = make(40, kv_heads=1), numbers(2, 40, 16)
    assert_same(
        lambda: feed(layer, x, causal=True), lambda: refer(layer, x, causal=True), [x, *layer.parameters()]
    )
    state = layer.init_state(2, 40, clock=Clock(), dtype=torch.float64)
    assert state.nbytes == layer.decoding_bytes(dims_of(40, 2, 1)) == 2 * 2 * 8 * 8 * 40
    outputs = []
    with torch.no_grad():
        for tokens in x.split([9, 1, 1, 29], dim=1):
            outputs.append(layer(tokens, Context(causal=True), state).y)
            state.clock.advance(tokens.shape[1])
    assert difference(torch.cat(outputs, 1), feed(layer, x, causal=True)) <= EXACT


def test_a_gate_of_the_next_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted leak."""
    merge, config = GatedAttention._merge, GatedAttentionConfig()
    assert gates.leak(GatedAttention, config, dims_of(70, 2), 2, CPU) <= gates.LEAK_TOLERANCE
    monkeypatch.setattr(GatedAttention, "_merge", lambda self, y, x: merge(self, y, x.roll(-1, 1)))
    with pytest.raises(GateFailed, match="causality gate"):
        gates.leak(GatedAttention, config, dims_of(70, 2), 2, CPU)
