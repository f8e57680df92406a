"""The norm of heads against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, numbers
from torch import Tensor

from bench.measure.memory import LiveStorage
from variants.ops import short_convolution
from variants.ops.head_norm import Activation, head_norm
from variants.ops.tile_size import Sizes


@pytest.mark.parametrize("piece", [2**20, 50])
@pytest.mark.parametrize("activation", [None, "silu", "sigmoid"])
def test_it_is_its_formula(
    activation: Activation | None, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece of the sequence, and in several."""
    monkeypatch.setattr(short_convolution, "PIECE", Sizes(piece, piece))
    y, scale, gate = numbers(2, 3, 11, 4), numbers(4, seed=2), numbers(2, 3, 11, 4, seed=3)

    def want() -> Tensor:
        normed = scale * y / (y.square().mean(-1, keepdim=True) + 0.3).sqrt()
        return normed if activation is None else normed * getattr(F, activation)(gate)

    def got() -> Tensor:
        chosen = gate if activation else None
        return head_norm(y, scale, chosen, activation=activation or "silu", epsilon=0.3, device_type="cpu")

    assert_same(got, want, [y, scale, *([gate] if activation else [])])


def test_only_inputs_are_saved() -> None:
    y, gate = (torch.randn(1, 2, 64, 4, requires_grad=True) for _ in range(2))
    scale = torch.ones(4, requires_grad=True)
    with LiveStorage() as storage:
        normed = head_norm(y, scale, gate, epsilon=1e-5, device_type="cpu")
        assert storage.live <= sum(t.nbytes for t in (y, gate, scale, normed))
