"""Retention against its recurrence, written out, and its decays against those of the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import D_MODEL, EXACT, HEADS, assert_same, difference, dims_for, make_layer, numbers, rotated
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.retnet import Retnet, RetnetConfig
from variants.base import Context
from variants.ops.recurrences import scan_chunks

SMALL: list[dict[str, Any]] = [{"chunk": 16}]

CPU = torch.device("cpu")
CAUSAL = Context(causal=True)


def make(seq_len: int, chunk: int = 16) -> Retnet:
    layer = make_layer(Retnet, RetnetConfig(chunk=chunk), dims_for(seq_len))
    assert isinstance(layer, Retnet)
    return layer


def test_it_is_registered() -> None:
    assert variants.load("retnet") is Retnet


def test_the_decays_are_those_of_the_paper() -> None:
    """31/32, 63/64, …"""
    decays = make(4).log_decay(CPU).exp()
    assert difference(decays, torch.tensor([31 / 32, 63 / 64], dtype=torch.float64)) <= EXACT


@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 64), (41, 8), (70, 64)])
def test_it_is_the_recurrence_of_the_paper(seq_len: int, chunk: int) -> None:
    """Token by token (eq. 6), with the group norm written out."""
    layer, x = make(seq_len, chunk), numbers(2, seq_len, D_MODEL)

    def recurrence() -> Tensor:
        heads = [(x @ w.T).unflatten(-1, (HEADS, -1)) for w in layer.projections.qkv.weight.chunk(3)]
        q, k, v = rotated(heads[0]), rotated(heads[1]), heads[2]
        decay = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=x.dtype)[:, None, None]
        state, outputs = x.new_zeros(2, HEADS, 8, 8), []
        for t in range(seq_len):
            state = decay * state + einsum("bhd,bhv->bhdv", k[:, t] / 8**0.5, v[:, t])
            outputs.append(einsum("bhd,bhdv->bhv", q[:, t], state))
        y = torch.stack(outputs, 1)
        y = y - y.mean(-1, keepdim=True)
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        z = x @ layer.gate.weight.T
        return (y.flatten(2) * z * z.sigmoid()) @ layer.projections.out.weight.T

    assert_same(lambda: layer(x, CAUSAL).y, recurrence, [x, *layer.parameters()])


def test_the_norm_cancels_the_size_of_keys() -> None:
    """And with it every normalisation of scores, apart from ε."""
    layer, x = make(50), numbers(1, 50, D_MODEL).detach()
    with torch.no_grad():
        layer.projections.qkv.weight[: 2 * D_MODEL] *= 1e3
        want = layer(x, CAUSAL).y
        layer.projections.qkv.weight[D_MODEL : 2 * D_MODEL] *= 7
    assert difference(layer(x, CAUSAL).y, want) <= 1e-7


def test_a_sum_over_the_whole_chunk_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    make_decay = scan_chunks.Decay.make

    def unmasked(log_decay: Tensor, sequences: int) -> scan_chunks.Decay:
        decay = make_decay(log_decay, sequences)
        return decay._replace(within=torch.ones_like(decay.within))

    monkeypatch.setattr(scan_chunks.Decay, "make", unmasked)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Retnet, RetnetConfig(), dims_for(75, 2), 2, CPU)
