"""DynamicConv against its definition, and LightConv, to which it reduces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, numbers
from torch import Tensor

import variants
from bench.measure import gates
from variants.attention.dynamic_conv import DynamicConv, DynamicConvConfig
from variants.attention.light_conv import LightConv, LightConvConfig
from variants.base import Context, Workload

SMALL: list[dict[str, Any]] = [{"kernel": (5,)}, {"kernel": (4,)}]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, kernel: int = 5) -> DynamicConv:
    torch.manual_seed(0)
    return DynamicConv(DynamicConvConfig(kernel=(kernel,)), dims_of(seq_len)).double()


def by_bands(layer: DynamicConv, x: Tensor, *, causal: bool) -> Tensor:
    """A matrix (B, H, T, T) with the weight of each pair, entry by entry."""
    tokens, kernel = x.shape[1], layer.kernel
    h = F.glu(x @ layer.input.weight.T)
    weights = (h @ layer.taps.weight.T).unflatten(-1, (2, kernel)).softmax(-1).transpose(1, 2)
    first = 1 - kernel if causal else -(kernel // 2)
    tap = torch.arange(tokens)[None] - torch.arange(tokens)[:, None] - first
    inside = (tap >= 0) & (tap < kernel)
    pairs = weights.gather(-1, tap.clamp(0, kernel - 1).expand(len(x), 2, -1, -1)) * inside
    mixed = pairs @ h.unflatten(-1, (2, -1)).transpose(1, 2)
    return mixed.transpose(1, 2).flatten(2) @ layer.out.weight.T


def test_it_is_registered() -> None:
    assert variants.load("dynamic_conv") is DynamicConv


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "kernel"), [(1, 5), (3, 31), (40, 1), (67, 4), (67, 31), (130, 31)])
def test_it_equals_its_band_matrix(seq_len: int, kernel: int, causal: bool) -> None:
    layer, x = make(seq_len, kernel), numbers(2, seq_len, 16)
    assert_same(
        lambda: layer(x, Context(causal=causal)).y,
        lambda: by_bands(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("causal", [True, False])
def test_taps_that_do_not_depend_on_the_token_are_light_conv(causal: bool) -> None:
    """In outputs, and in gradients of inputs, projections and logits."""
    dynamic, x = make(67), numbers(2, 67, 16)
    light = LightConv(LightConvConfig(kernel=(5,)), dims_of(67)).double()
    light.load_state_dict(
        {name: t for name, t in dynamic.state_dict().items() if name != "taps.weight"} | {"taps": light.taps}
    )
    logits = light.taps.detach().clone().requires_grad_()
    dynamic.logits = lambda h: logits.expand(*h.shape[:2], -1, -1)  # type: ignore[method-assign]
    assert_same(
        lambda: dynamic(x, Context(causal=causal)).y,
        lambda: light(x, Context(causal=causal)).y,
        [x, dynamic.input.weight, dynamic.out.weight, logits],
        [x, light.input.weight, light.out.weight, light.taps],
    )


def test_parameters_are_those_of_the_paper() -> None:
    """3·C² for a gated input and an output, and H·k·C for the logits."""
    assert sum(p.numel() for p in make(9, 31).parameters()) == 3 * 16**2 + 2 * 31 * 16


def test_taps_from_the_next_token_fail_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = DynamicConv.logits
    monkeypatch.setattr(DynamicConv, "logits", lambda self, h: logits(self, h.roll(-1, 1)))
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(DynamicConv, DynamicConvConfig(), dims_of(75, 2), 2, CPU)
