"""Kimi Delta Attention against its formula with explicit matrices, its limits and its causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_oracle import written_out
from oracles import assert_same, numbers
from torch import Tensor

import variants
from bench.measure import gates
from variants.attention.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from variants.attention.kda import Kda, KdaConfig
from variants.base import Context, Workload
from variants.ops.recurrences import chunk_decay

SMALL: list[dict[str, Any]] = [{"chunk": 16, "rank": 3}, {"conv": 1, "chunk": 24}]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, **knobs: Any) -> Kda:
    """With decays of every size."""
    torch.manual_seed(0)
    layer = Kda(KdaConfig(**{"rank": 5, **knobs}), dims_of(seq_len)).double()
    with torch.no_grad():
        for parameter in (layer.scale, *layer.rates.parameters(), *layer.decay.parameters()):
            parameter.normal_()
    return layer


def formula(layer: Kda, x: Tensor) -> Tensor:
    decays, gates = (x @ (up.weight @ down.weight).T for down, up in (layer.decay, layer.output_gate))
    steps = (1 + (decays + layer.rates.bias).exp()).log().unflatten(-1, (layer.dims.heads, -1))
    alpha = (-layer.rates.log_rates.exp()[:, None] * steps).exp()
    return written_out(layer, x, alpha, gates.sigmoid())


def test_it_is_registered() -> None:
    assert variants.load("kda") is Kda


@pytest.mark.parametrize(("seq_len", "knobs"), [(1, {}), (21, {"chunk": 8}), (33, {"conv": 1})])
def test_it_is_the_formula_of_the_paper(seq_len: int, knobs: dict[str, Any]) -> None:
    layer, x = make(seq_len, **knobs), numbers(2, seq_len, 16)
    assert_same(lambda: layer(x, Context(causal=True)).y, lambda: formula(layer, x), [x, *layer.parameters()])


def test_equal_decays_of_all_channels_are_gated_delta_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the gate of the outputs."""
    for variant in (Kda, GatedDeltaNet):
        monkeypatch.setattr(variant, "gate", lambda self, x: None)
    layer, other = make(50), GatedDeltaNet(GatedDeltaNetConfig(), dims_of(50)).double()
    with torch.no_grad():
        layer.decay[1].weight.copy_(layer.decay[1].weight[::8].repeat_interleave(8, 0))
        layer.rates.bias.copy_(layer.rates.bias[::8].repeat_interleave(8, 0))
        state = layer.state_dict()
        del state["rates.bias"]
        other.load_state_dict(state, strict=False)
        other.rates.bias.copy_(layer.rates.bias[::8])
        other.decay.weight.copy_(layer.decay[1].weight[::8] @ layer.decay[0].weight)
    x = numbers(2, 50, 16)
    shared = ["scale", "taps", "strength.weight", "projections.qkv.weight", "rates.log_rates"]
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: other(x, Context(causal=True)).y,
        [x, *(layer.get_parameter(name) for name in shared)],
        [x, *(other.get_parameter(name) for name in shared)],
    )


def test_a_channel_that_decays_to_0_forgets_alone() -> None:
    """The others are unchanged; nothing is NaN in float32."""
    layer = make(70).float()
    with torch.no_grad():
        layer.decay[1].weight.zero_()
        layer.rates.log_rates.zero_()
        layer.rates.bias.fill_(-30.0)
        layer.rates.bias[3] = 1e5
    x = numbers(1, 70, 16).detach().float().requires_grad_()
    y = layer(x, Context(causal=True)).y
    gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() for g in (y, *gradients))
    want = layer.double().reference(x.double(), Context(causal=True))
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)


def test_weights_of_later_keys_fail_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the last blocks only, which are a few tokens."""
    pairs = chunk_decay.ChannelDecay.pairs

    def unmasked(self: chunk_decay.ChannelDecay, rows: Tensor, columns: Tensor) -> Tensor:
        self.own = torch.ones_like(self.own)
        return pairs(self, rows, columns)

    monkeypatch.setattr(chunk_decay.ChannelDecay, "pairs", unmasked)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Kda, KdaConfig(), dims_of(75, 2), 2, CPU)
