"""Gated linear attention against its recurrence, written out, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import D_MODEL, HEADS, assert_same, difference, dims_for, make_layer, numbers
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.gla import Gla, GlaConfig
from variants.base import Context
from variants.ops.recurrences.channel_chunks import Halves

SMALL: list[dict[str, Any]] = [{"chunk": 16, "rank": 4, "temperature": 2.0}]

CAUSAL = Context(causal=True)


def make(seq_len: int, **knobs: Any) -> Gla:
    layer = make_layer(Gla, GlaConfig(**{"temperature": 2.0, **knobs}), dims_for(seq_len))
    assert isinstance(layer, Gla)
    return layer


def test_it_is_registered() -> None:
    assert variants.load("gla") is Gla


@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 64), (41, 8), (70, 64)])
def test_it_is_the_recurrence_of_the_paper(seq_len: int, chunk: int) -> None:
    """Token by token, with decays and norm written out."""
    layer, x = make(seq_len, chunk=chunk), numbers(2, seq_len, D_MODEL)

    def recurrence() -> Tensor:
        weights = layer.qkv.weight.split([8, 8, 16])
        q, k, v = ((x @ w.T).unflatten(-1, (HEADS, -1)) for w in weights)
        logits = x @ layer.low.weight.T @ layer.decay.weight.T + layer.decay.bias
        decays = (1 / (1 + (-logits).exp())).sqrt().unflatten(-1, (HEADS, -1))
        state, outputs = x.new_zeros(2, HEADS, 4, 8), []
        for t in range(seq_len):
            state = decays[:, t, :, :, None] * state + einsum("bhd,bhv->bhdv", k[:, t], v[:, t])
            outputs.append(einsum("bhd,bhdv->bhv", q[:, t] / 2, state))
        y = torch.stack(outputs, 1)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.scale
        z = x @ layer.gate.weight.T
        return (y.flatten(2) * z * z.sigmoid()) @ layer.out.weight.T

    assert_same(lambda: layer(x, CAUSAL).y, recurrence, [x, *layer.parameters()])


def test_decays_of_zero_leave_the_own_value() -> None:
    """The norm of its value, with the sign of q·k."""
    layer, x = make(40), numbers(1, 40, D_MODEL).detach()
    with torch.no_grad():
        layer.low.weight.zero_()
        layer.decay.bias.fill_(-1e4)
        layer.qkv.weight[:8] = 1e3 * layer.qkv.weight[8:16]  # q·k > 0
        v = (x @ layer.qkv.weight[16:].T).unflatten(-1, (HEADS, -1))
        y = (v / v.square().mean(-1, keepdim=True).sqrt()).flatten(2)
        want = layer.out(torch.nn.functional.silu(layer.gate(x)) * y)
        assert difference(layer(x, CAUSAL).y, want) <= 1e-4  # ε of the norm


def test_without_decays_the_order_of_earlier_tokens_does_not_matter() -> None:
    layer, x = make(40), numbers(1, 40, D_MODEL).detach()
    moved = torch.cat([x[:, :39].flip(1), x[:, 39:]], 1)
    assert difference(layer(moved, CAUSAL).y[:, -1], layer(x, CAUSAL).y[:, -1]) > 1e-2
    with torch.no_grad():
        layer.low.weight.zero_()
        layer.decay.bias.fill_(1e4)
    assert difference(layer(moved, CAUSAL).y[:, -1], layer(x, CAUSAL).y[:, -1]) <= 1e-9


def test_weights_of_later_keys_fail_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of a pair change places."""
    place = Halves.place
    monkeypatch.setattr(Halves, "place", lambda halves, pairs: place(halves, pairs.mT))
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Gla, GlaConfig(), dims_for(75, 2), 2, torch.device("cpu"))
