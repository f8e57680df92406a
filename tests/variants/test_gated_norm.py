"""The gated norm against the norms of torch and against its definition, in outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, numbers
from torch import Tensor

from variants.ops import gated_norm as gated_norm_module
from variants.ops.gated_norm import GatedNorm, gated_norm
from variants.ops.tile_size import Sizes

FORMS = [
    GatedNorm(*each, eps=0.03)
    for each in itertools.product(("silu", "sigmoid"), (False, True), (False, True))
]


def by_torch(form: GatedNorm, y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
    gate = (F.silu(z) if form.activation == "silu" else z.sigmoid()).view_as(y)
    h = y * gate if form.gate_first else y
    norm = F.layer_norm if form.centred else F.rms_norm
    found = norm(h, h.shape[-1:], weight, eps=form.eps)
    return (found if form.gate_first else found * gate).flatten(2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("piece", [1, 2**20])
def test_it_is_the_norm_of_torch_times_a_gate(
    form: GatedNorm, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in many, which do not divide the vectors."""
    monkeypatch.setattr(gated_norm_module, "PIECE", Sizes(piece, piece))
    monkeypatch.setattr(gated_norm_module, "PIECES", 4)
    y, z, weight = numbers(2, 5, 3, 8), numbers(2, 5, 24, seed=2), numbers(8, seed=3)
    assert_same(
        lambda: gated_norm(form, y, z, weight, device_type="cpu"),
        lambda: by_torch(form, y, z, weight),
        [y, z, weight],
    )


def test_no_weight_is_a_weight_of_one() -> None:
    form = GatedNorm("silu", centred=True)
    y, z = numbers(2, 5, 3, 8).transpose(0, 1), numbers(5, 2, 24)
    assert_same(
        lambda: gated_norm(form, y, z, device_type="cpu"),
        lambda: gated_norm(form, y, z, torch.ones(8, dtype=y.dtype), device_type="cpu"),
        [y, z],
    )


def test_a_vector_of_zeros_has_a_finite_gradient() -> None:
    y = torch.zeros(1, 1, 2, 4, requires_grad=True)
    out = gated_norm(GatedNorm("silu"), y, torch.ones(1, 1, 8), device_type="cpu")
    assert torch.equal(out, torch.zeros_like(out))
    (gradient,) = torch.autograd.grad(out.sum(), y)
    assert gradient.isfinite().all()
