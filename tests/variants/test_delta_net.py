"""DeltaNet against its formula with explicit matrices, and its causality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_oracle import written_out
from oracles import assert_same, difference, numbers
from torch import Tensor

import variants
from bench.measure import gates
from variants.attention.delta_net import DeltaNet, DeltaNetConfig
from variants.base import Context, Workload
from variants.ops.convolutions import short_convolution
from variants.ops.recurrences import chunk_decay

SMALL: list[dict[str, Any]] = [{"chunk": 16}, {"conv": 1, "chunk": 24}]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, **knobs: Any) -> DeltaNet:
    torch.manual_seed(0)
    layer = DeltaNet(DeltaNetConfig(**knobs), dims_of(seq_len)).double()
    with torch.no_grad():
        layer.scale.normal_()
    return layer


def test_it_is_registered() -> None:
    assert variants.load("delta_net") is DeltaNet


@pytest.mark.parametrize(("seq_len", "knobs"), [(1, {}), (21, {"chunk": 8}), (33, {"conv": 1})])
def test_it_is_the_formula_of_the_paper(seq_len: int, knobs: dict[str, Any]) -> None:
    layer, x = make(seq_len, **knobs), numbers(2, seq_len, 16)
    assert_same(
        lambda: layer(x, Context(causal=True)).y, lambda: written_out(layer, x), [x, *layer.parameters()]
    )


def test_chunks_change_no_output() -> None:
    layer, other = make(70, chunk=64), make(70, chunk=5)
    other.load_state_dict(layer.state_dict())
    x = numbers(2, 70, 16)
    assert_same(
        lambda: layer(x, Context(causal=True)).y,
        lambda: other(x, Context(causal=True)).y,
        [x, *layer.parameters()],
        [x, *other.parameters()],
    )


def test_a_key_that_is_written_again_returns_its_last_value() -> None:
    """Without a convolution, equal tokens have equal keys; with strength 1, the later value replaces the
    earlier one, so a repeated pair of tokens changes nothing. A position in the key would change it."""
    layer = make(12, conv=1)
    with torch.no_grad():
        layer.strength.weight.zero_()
    layer._beta = lambda x: torch.ones(len(x), 2, x.shape[1], 1, dtype=x.dtype)  # type: ignore[method-assign]
    x = numbers(1, 6, 16).detach()
    again = torch.cat([x, x[:, -1:].expand(-1, 6, -1)], 1)
    y = layer(again, Context(causal=True)).y
    # up to what is added to the square of a length
    assert difference(y[:, 6:], y[:, 5:6].expand(-1, 6, -1)) <= 1e-5


def test_scores_of_later_keys_fail_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmasked(self: chunk_decay.NoDecay, rows: Tensor, columns: Tensor) -> Tensor:
        return rows @ columns.mT

    monkeypatch.setattr(chunk_decay.NoDecay, "pairs", unmasked)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(DeltaNet, DeltaNetConfig(), dims_of(75, 2), 2, CPU)


def test_a_centred_convolution_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    causal = short_convolution._convolved

    def centred(x: Tensor, taps: Tensor, bias: None, first: int, end: int) -> Tensor:
        return causal(F.pad(x, (0, 0, 0, 1))[:, 1:], taps, bias, first, end)

    monkeypatch.setattr(short_convolution, "_convolved", centred)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(DeltaNet, DeltaNetConfig(), dims_of(75, 2), 2, CPU)


def test_a_bidirectional_form_is_refused() -> None:
    reason = DeltaNet.unsupported(DeltaNetConfig(), dims_of(8), causal=False)
    assert reason == "has no bidirectional form"


def test_the_state_does_not_grow_after_the_convolution_is_filled() -> None:
    layer = make(40)
    sizes = [layer.state_bytes(dims_of(tokens)) for tokens in (1, 2, 3, 4, 4000)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == sizes[4]
