"""The short convolution against torch's own in float64, and the norm of heads against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, numbers
from torch import Tensor

from bench.measure.memory import LiveStorage
from variants.ops import short_convolution as module
from variants.ops.head_norm import EPSILON, Activation, head_norm
from variants.ops.short_convolution import short_convolution
from variants.ops.tile_size import Sizes

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
@pytest.mark.parametrize("activation", [None, "silu", "sigmoid"])
def test_the_norm_of_heads_is_its_formula(activation: Activation | None) -> None:
    y, scale, gate = numbers(2, 3, 11, 4), numbers(4, seed=2), numbers(2, 3, 11, 4, seed=3)

    def want() -> Tensor:
        normed = scale * y / (y.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        return normed if activation is None else normed * getattr(F, activation)(gate)

    def got() -> Tensor:
        chosen = gate if activation else None
        return head_norm(y, scale, chosen, activation=activation or "silu", device_type="cpu")

    assert_same(got, want, [y, scale, *([gate] if activation else [])])


@pytest.mark.usefixtures("_piece")
def test_only_inputs_are_saved() -> None:
    x, taps = torch.randn(1, 64, 8, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    scale, gate = torch.ones(4, requires_grad=True), torch.randn(1, 2, 64, 4, requires_grad=True)
    with LiveStorage() as storage:
        mixed = short_convolution(x, taps, device_type="cpu")
        y = head_norm(mixed.unflatten(-1, (2, 4)).transpose(1, 2), scale, gate, device_type="cpu")
        assert storage.live <= sum(t.nbytes for t in (x, taps, scale, gate, mixed, y))


def test_half_precision_is_rounded_once() -> None:
    """Sums are float32: outputs are those of the rounded inputs, rounded."""
    x, taps = torch.randn(1, 30, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    want = short_convolution(x.double(), taps.double(), device_type="cpu").bfloat16()
    got = short_convolution(x, taps, device_type="cpu")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2**-8, atol=1e-6)
