<<<<<<< HEAD
"""The short convolution against torch's own in float64."""
=======
"""The short convolution against that of torch, in outputs and gradients."""
>>>>>>> help/gates23

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
<<<<<<< HEAD
from oracles import assert_same, numbers
from torch import Tensor

from bench.measure.memory import LiveStorage
=======
from oracles import assert_same, difference, numbers
from torch import Tensor

>>>>>>> help/gates23
from variants.ops import short_convolution as module
from variants.ops.short_convolution import short_convolution
from variants.ops.tile_size import Sizes

<<<<<<< HEAD
PIECE = [2**20, 20]
"""One piece, and pieces of some tokens."""


@pytest.fixture(params=PIECE)
def _piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", Sizes(request.param, request.param))


@pytest.mark.usefixtures("_piece")
@pytest.mark.parametrize("seq_len", [1, 3, 40])
@pytest.mark.parametrize("width", [2, 4])
def test_it_is_a_causal_convolution(seq_len: int, width: int) -> None:
    x, taps = numbers(2, seq_len, 5), numbers(5, width, seed=2)

    def want() -> Tensor:
        padded = F.pad(x.mT, (width - 1, 0))
        return F.silu(F.conv1d(padded, taps[:, None], groups=5)).mT

    assert_same(lambda: short_convolution(x, taps, device_type="cpu"), want, [x, taps])


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
=======

def by_torch(x: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    channels, width = filters.shape
    padded = F.pad(x.mT, (width - 1, 0))
    return F.silu(F.conv1d(padded, filters.flip(1)[:, None], bias, groups=channels).mT)


@pytest.mark.parametrize(("tokens", "width"), [(1, 4), (2, 4), (3, 1), (29, 4), (40, 7)])
@pytest.mark.parametrize("piece", [1, 100, 2**20])
def test_it_is_the_convolution_of_torch(
    tokens: int, width: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, in one piece and in many, which may be shorter than the filters."""
    monkeypatch.setattr(module, "PIECE", Sizes(piece, piece))
    x, filters, bias = numbers(2, tokens, 5), numbers(5, width, seed=2), numbers(5, seed=3)
    assert_same(
        lambda: short_convolution(x, filters, bias, device_type="cpu"),
        lambda: by_torch(x, filters, bias),
        [x, filters, bias],
    )


def test_bfloat16_inputs_have_float32_sums() -> None:
    x, filters, bias = numbers(2, 50, 5).detach().bfloat16(), numbers(5, 4, seed=2), numbers(5, seed=3)
    got = short_convolution(x, filters.float(), bias.float(), device_type="cpu")
    assert got.dtype == torch.bfloat16
    assert difference(got.double(), by_torch(x.double(), filters, bias)) <= 2**-8
>>>>>>> help/gates23
