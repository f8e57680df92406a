"""Lightning attention against its recurrence, written out, and its decays by head and layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import D_MODEL, EXACT, HEADS, assert_same, difference, dims_for, make_layer, numbers
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.lightning import Lightning, LightningConfig
from variants.base import Context
from variants.ops.recurrences import scan_chunks

SMALL: list[dict[str, Any]] = [{"chunk": 16, "decay_layers": 2}]

CPU = torch.device("cpu")
CAUSAL = Context(causal=True)


def make(seq_len: int, index: int = 0, **knobs: Any) -> Lightning:
    layer = make_layer(Lightning, LightningConfig(**knobs), dims_for(seq_len), index=index)
    assert isinstance(layer, Lightning)
    return layer


def test_it_is_registered() -> None:
    assert variants.load("lightning") is Lightning


@pytest.mark.parametrize(
    ("index", "layers", "factor"), [(0, 5, 1), (1, 5, 0.75), (4, 5, 0), (9, 5, 0), (0, 1, 1)]
)
def test_the_decay_falls_with_head_and_layer(index: int, layers: int, factor: float) -> None:
    """Slopes 1/16 and 1/256 of two heads, times a factor of the layer."""
    logs = make(4, index, decay_layers=layers).log_decay(CPU)
    want = torch.tensor([1 / 16, 1 / 256], dtype=torch.float64) * -(factor + 1e-5)
    assert difference(logs / want, torch.ones_like(want)) <= EXACT


@pytest.mark.parametrize(("seq_len", "chunk", "index"), [(1, 64, 0), (41, 8, 0), (70, 64, 1)])
def test_it_is_the_recurrence_of_the_paper(seq_len: int, chunk: int, index: int) -> None:
    """Token by token, with activations and norm written out."""
    layer, x = make(seq_len, index, chunk=chunk, decay_layers=3), numbers(2, seq_len, D_MODEL)
    factor = 1 - index / 2 + 1e-5
    decays = [math.exp(-factor / 16), math.exp(-factor / 256)]

    def recurrence() -> Tensor:
        projected = (x @ w.T for w in layer.projections.qkv.weight.chunk(3))
        q, k, v = ((h * h.sigmoid()).unflatten(-1, (HEADS, -1)) for h in projected)
        decay = torch.tensor(decays, dtype=x.dtype)[:, None, None]
        state, outputs = x.new_zeros(2, HEADS, 8, 8), []
        for t in range(seq_len):
            state = decay * state + einsum("bhd,bhv->bhdv", k[:, t], v[:, t])
            outputs.append(einsum("bhd,bhdv->bhv", q[:, t], state))
        y = torch.stack(outputs, 1).flatten(2)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.scale
        return (y * (x @ layer.gate.weight.T).sigmoid()) @ layer.projections.out.weight.T

    assert_same(lambda: layer(x, CAUSAL).y, recurrence, [x, *layer.parameters()])


def test_the_last_layers_sum_all_tokens() -> None:
    """Their decays are nearly 1, so a permutation of the tokens before the last one hardly changes it."""
    x = numbers(1, 40, D_MODEL).detach()
    moved = torch.cat([x[:, :39].flip(1), x[:, 39:]], 1)
    changes = []
    for index in (0, 1):
        layer = make(40, index, decay_layers=2)
        changes.append(difference(layer(moved, CAUSAL).y[:, -1], layer(x, CAUSAL).y[:, -1]))
    assert changes[1] < 1e-3 < 1e-2 < changes[0]


def test_a_sum_over_the_whole_chunk_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    make_decay = scan_chunks.Decay.make

    def unmasked(log_decay: Tensor, sequences: int) -> scan_chunks.Decay:
        decay = make_decay(log_decay, sequences)
        return decay._replace(within=torch.ones_like(decay.within))

    monkeypatch.setattr(scan_chunks.Decay, "make", unmasked)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Lightning, LightningConfig(), dims_for(75, 2), 2, CPU)
