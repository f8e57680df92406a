"""The short convolution against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, numbers
from torch import Tensor

from bench.measure.memory import LiveStorage
from variants.ops.convolutions import short_convolution as module
from variants.ops.convolutions.short_convolution import short_convolution
from variants.ops.tile_size import Sizes

PIECE = [2**20, 20]
"""One piece, and pieces of some tokens."""


@pytest.fixture(params=PIECE)
def _piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", Sizes(request.param, request.param))


@pytest.mark.usefixtures("_piece")
@pytest.mark.parametrize("seq_len", [1, 3, 40])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_a_causal_convolution(seq_len: int, width: int, has_bias: bool) -> None:
    x, taps = numbers(2, seq_len, 5), numbers(5, width, seed=2)
    bias = numbers(5, seed=3) if has_bias else None

    def want() -> Tensor:
        padded = F.pad(x.mT, (width - 1, 0))
        return F.silu(F.conv1d(padded, taps[:, None], bias, groups=5)).mT

    parameters = [taps] if bias is None else [taps, bias]
    assert_same(lambda: short_convolution(x, taps, bias, device_type="cpu"), want, [x, *parameters])


@pytest.mark.usefixtures("_piece")
def test_only_inputs_are_saved() -> None:
    x, taps = torch.randn(1, 64, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    with LiveStorage() as storage:
        y = short_convolution(x, taps, device_type="cpu")
        assert storage.live <= sum(t.nbytes for t in (x, taps, y))


def test_sums_of_half_precision_are_float32() -> None:
    """Outputs are those of the rounded inputs, and gradients are rounded once."""
    x, taps = torch.randn(1, 30, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    inputs = [t.requires_grad_() for t in (x, taps)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    got, want = (short_convolution(*t, device_type="cpu") for t in (inputs, wide))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    grads, wanted = (torch.autograd.grad(y.square().sum(), t) for y, t in ((got, inputs), (want, wide)))
    for a, b in zip(grads, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-4)
