"""Mamba-2 against its recurrence, written out, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import D_MODEL, assert_same, difference, dims_for, make_layer, numbers
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.mamba2 import Mamba2, Mamba2Config
from variants.base import Context
from variants.ops.convolutions import short_convolution as convolution_module

SMALL: list[dict[str, Any]] = [
    {"expand": 2, "state": 6, "groups": 2, "kernel": 3, "chunk": 16},
    {"state": 8, "kernel": 1, "chunk": 16},
]

CAUSAL = Context(causal=True)


def make(seq_len: int, **knobs: Any) -> Mamba2:
    layer = make_layer(Mamba2, Mamba2Config(**{"state": 6, **knobs}), dims_for(seq_len))
    assert isinstance(layer, Mamba2)
    return layer


def test_it_is_registered() -> None:
    assert variants.load("mamba2") is Mamba2


@pytest.mark.parametrize(
    ("seq_len", "knobs"),
    [
        (1, {}),
        (3, {"kernel": 5}),
        (41, {"chunk": 8, "expand": 2, "groups": 2}),
        (70, {"groups": 2}),
    ],
)
def test_it_is_the_recurrence_of_the_paper(seq_len: int, knobs: dict[str, Any]) -> None:
    """Token by token, with convolution, steps and norm written out."""
    layer, x = make(seq_len, **knobs), numbers(2, seq_len, D_MODEL)
    inner, shared, groups = layer.inner, layer.shared, layer.config.groups
    per_group = layer.heads // groups

    def recurrence() -> Tensor:
        z, inputs, logits = (x @ layer.input.weight.T).split([inner, layer.convolved, layer.heads], -1)
        rows = []
        for t in range(seq_len):
            total = layer.filter_bias
            for lag in range(min(t + 1, layer.config.kernel)):
                total = total + layer.filters[:, -1 - lag] * inputs[:, t - lag]
            rows.append(total * total.sigmoid())
        values, b, c = torch.stack(rows, 1).split([inner, shared, shared], -1)
        values = values.unflatten(-1, (layer.heads, -1))
        b, c = (h.unflatten(-1, (groups, -1)).repeat_interleave(per_group, 2) for h in (b, c))
        steps = (1 + (logits + layer.step_bias).exp()).log()
        state, outputs = x.new_zeros(2, layer.heads, 6, inner // layer.heads), []
        for t in range(seq_len):
            decay = (-steps[:, t] * layer.rate.exp()).exp()
            own = einsum("bh,bhn,bhp->bhnp", steps[:, t], b[:, t], values[:, t])
            state = decay[..., None, None] * state + own
            outputs.append(einsum("bhn,bhnp->bhp", c[:, t], state) + layer.skip[:, None] * values[:, t])
        y = torch.stack(outputs, 1).flatten(2) * z * z.sigmoid()
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.scale
        return y @ layer.out.weight.T

    assert_same(lambda: layer(x, CAUSAL).y, recurrence, [x, *layer.parameters()])


def test_steps_lie_in_the_range_of_the_paper_at_first() -> None:
    torch.manual_seed(0)
    layer = Mamba2(Mamba2Config(expand=64), dims_for(8))
    steps = torch.nn.functional.softplus(layer.step_bias)
    assert 0.9e-3 < steps.min() < 2e-3
    assert 5e-2 < steps.max() < 1.1e-1
    assert 1 <= layer.rate.exp().min() <= layer.rate.exp().max() <= 16


def test_with_fast_decays_a_token_reads_the_convolution_only() -> None:
    """A change of a token does not reach those after the taps that read it."""
    layer, x = make(40, kernel=4), numbers(1, 40, D_MODEL).detach()
    with torch.no_grad():
        layer.rate.fill_(30.0)
    changed = x.clone()
    changed[:, 10] += 1
    moved = (layer(changed, CAUSAL).y - layer(x, CAUSAL).y)[0].abs().amax(-1)
    assert (moved[10:14] > 1e-6).all()
    assert max(moved[:10].max(), moved[14:].max()) <= 1e-12


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    reason = Mamba2.unsupported(Mamba2Config(groups=3), dims_for(8), causal=True)
    assert reason == "groups=3: must divide the 2 heads of the state"


def test_a_convolution_of_later_tokens_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The taps are centred on their token, as those of a convolution with padding on both sides."""
    causal = convolution_module._convolved

    def centred(x: Tensor, taps: Tensor, bias: Tensor, first: int, end: int) -> Tensor:
        return causal(x.roll(-1, 1), taps, bias, first, end)

    monkeypatch.setattr(convolution_module, "_convolved", centred)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Mamba2, Mamba2Config(), dims_for(75, 2), 2, torch.device("cpu"))


def test_a_model_starts_with_finite_outputs_of_its_size() -> None:
    """Without the weights of `make_layer`: as it is built."""
    torch.manual_seed(0)
    layer = Mamba2(Mamba2Config(), dims_for(50))
    y = layer(torch.randn(2, 50, D_MODEL), CAUSAL).y
    assert difference(y, torch.zeros_like(y)) < 10
    assert y.std() > 1e-3
