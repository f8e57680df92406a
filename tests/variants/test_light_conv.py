"""LightConv against torch's convolution, and the convolution by bands in every shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import EXACT, assert_same, difference, numbers
from torch import Tensor

import variants
from bench.measure import gates
from variants.attention.light_conv import LightConv, LightConvConfig
from variants.base import Context, Workload
from variants.ops.convolutions import banded_convolution
from variants.ops.convolutions.banded_convolution import softmax_convolution
from variants.ops.tile_size import Sizes

SMALL: list[dict[str, Any]] = [{"kernel": (5,)}, {"kernel": (4,)}]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, kernel: int = 5) -> LightConv:
    torch.manual_seed(0)
    return LightConv(LightConvConfig(kernel=(kernel,)), dims_of(seq_len)).double()


def by_torch(layer: LightConv, x: Tensor, *, causal: bool) -> Tensor:
    """torch's depthwise convolution of a padded sequence."""
    h = F.glu(x @ layer.input.weight.T).mT
    before = layer.kernel - 1 if causal else layer.kernel // 2
    h = F.pad(h, (before, layer.kernel - 1 - before))
    weights = layer.taps.softmax(-1).repeat_interleave(8, dim=0)[:, None]
    return F.conv1d(h, weights, groups=16).mT @ layer.out.weight.T


def test_it_is_registered() -> None:
    assert variants.load("light_conv") is LightConv


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "kernel"), [(1, 5), (3, 31), (40, 1), (67, 4), (67, 31), (130, 31)])
def test_it_equals_the_convolution_of_torch(seq_len: int, kernel: int, causal: bool) -> None:
    layer, x = make(seq_len, kernel), numbers(2, seq_len, 16)
    assert_same(
        lambda: layer(x, Context(causal=causal)).y,
        lambda: by_torch(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    ("seq_len", "kernel", "offset"), [(1, 3, -2), (50, 7, -6), (50, 7, -3), (20, 31, -30)]
)
def test_segments_change_nothing(
    seq_len: int, kernel: int, offset: int, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, with inputs of their neighbours on both sides."""
    torch.manual_seed(0)
    x = numbers(2, seq_len, 3, 4)
    logits = numbers(*((3, kernel) if static else (2, seq_len, 3, kernel)))

    def run(size: int) -> Tensor:
        monkeypatch.setattr(banded_convolution, "SEGMENT", Sizes(size, size))
        return softmax_convolution(x, logits, offset=offset, outputs=seq_len, device_type="cpu")

    assert_same(lambda: run(1), lambda: run(2**20), [x, logits])


def test_equal_taps_are_a_moving_average() -> None:
    layer, x = make(40), numbers(1, 40, 16).detach()
    with torch.no_grad():
        layer.taps.zero_()
    h = F.pad(F.glu(x @ layer.input.weight.T), (0, 0, 4, 0)).cumsum(1)
    means = torch.cat([h[:, 4:5], h[:, 5:] - h[:, :-5]], 1) / 5
    assert difference(layer(x, Context(causal=True)).y, means @ layer.out.weight.T) <= EXACT


def test_higher_layers_use_the_last_kernel() -> None:
    config = LightConvConfig(kernel=(3, 7))
    assert [LightConv(config, dims_of(9), layer).kernel for layer in range(4)] == [3, 7, 7, 7]


def test_a_centred_kernel_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightConv, "_offset", lambda self, *, causal: -(self.kernel // 2))
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(LightConv, LightConvConfig(), dims_of(75, 2), 2, CPU)
