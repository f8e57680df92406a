"""The short convolution against that of torch, in outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, difference, numbers
from torch import Tensor

from variants.ops import short_convolution as module
from variants.ops.short_convolution import short_convolution
from variants.ops.tile_size import Sizes


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
