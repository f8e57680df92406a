"""Gated DeltaNet against its formula with explicit matrices, its limits and its causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_oracle import written_out
from oracles import EXACT, assert_same, difference, numbers
from torch import Tensor

import variants
from bench.measure import gates
from variants.attention.delta_net import DeltaNet, DeltaNetConfig
from variants.attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from variants.base import Context, Workload
from variants.ops.recurrences import chunk_decay
from variants.ops.recurrences.decay_gates import DecayRates

SMALL: list[dict[str, Any]] = [{"chunk": 16}, {"conv": 1, "chunk": 24}]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, **knobs: Any) -> GatedDeltaNet:
    """With decays of every size."""
    torch.manual_seed(0)
    layer = GatedDeltaNet(GatedDeltaNetConfig(**knobs), dims_of(seq_len)).double()
    with torch.no_grad():
        layer.scale.normal_()
        layer.rates.log_rates.normal_()
        layer.rates.bias.normal_()
        layer.decay.weight.normal_()
    return layer


def formula(layer: GatedDeltaNet, x: Tensor) -> Tensor:
    steps = (1 + (x @ layer.decay.weight.T + layer.rates.bias).exp()).log()
    alpha = (-layer.rates.log_rates.exp() * steps).exp()
    gate = F.silu(x @ layer.output_gate.weight.T)
    return written_out(layer, x, alpha[..., None].expand(-1, -1, -1, layer.dims.head_dim), gate)


def test_it_is_registered() -> None:
    assert variants.load("gated_delta_net") is GatedDeltaNet


@pytest.mark.parametrize(("seq_len", "knobs"), [(1, {}), (21, {"chunk": 8}), (33, {"conv": 1})])
def test_it_is_the_formula_of_the_paper(seq_len: int, knobs: dict[str, Any]) -> None:
    layer, x = make(seq_len, **knobs), numbers(2, seq_len, 16)
    assert_same(lambda: layer(x, Context(causal=True)).y, lambda: formula(layer, x), [x, *layer.parameters()])


def test_without_decays_and_gates_it_is_delta_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedDeltaNet, "gate", lambda self, x: None)
    layer, plain = make(50), DeltaNet(DeltaNetConfig(), dims_of(50)).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.rates.log_rates.fill_(-60.0)
    x = numbers(2, 50, 16)
    shared = [name for name, _ in plain.named_parameters()]
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: plain(x, Context(causal=True)).y,
        [x, *(layer.get_parameter(name) for name in shared)],
        [x, *plain.parameters()],
    )


def test_a_decay_to_0_leaves_the_own_write() -> None:
    """In any dtype, and without NaN: an earlier token changes nothing, to the bit."""
    layer = make(40, conv=1)
    with torch.no_grad():
        layer.rates.log_rates.fill_(20.0)
        layer.decay.weight.zero_()
    for dtype in (torch.float32, torch.float64):
        x = numbers(1, 40, 16).detach().to(dtype)
        other = x.clone()
        other[:, :39] += 1
        last = [layer.to(dtype)(t, Context(causal=True)).y[:, -1] for t in (x, other)]
        assert last[0].isfinite().all()
        assert torch.equal(*last)
    assert difference(*(layer(t, Context(causal=True)).y[:, 0] for t in (x, other))) > EXACT


def test_initial_decays_are_those_of_the_authors() -> None:
    """Rates up to 16, times steps from 0.001 to 0.1."""
    torch.manual_seed(0)
    rates = DecayRates(4000, 1)
    decays = rates(torch.zeros(1, 4000, 1, 1))
    assert (decays < 0).all()
    assert decays.min() >= -1.6
    steps = F.softplus(rates.bias)
    assert 1e-3 <= steps.min() < 1.1e-3
    assert 0.09 < steps.max() <= 0.1001


def test_decays_of_later_keys_fail_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(self: chunk_decay.HeadDecay, rows: Tensor, columns: Tensor) -> Tensor:
        return rows @ columns.mT

    monkeypatch.setattr(chunk_decay.HeadDecay, "pairs", unmasked)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(GatedDeltaNet, GatedDeltaNetConfig(), dims_of(75, 2), 2, CPU)
