"""The gated norm against the norms of torch and against its definition, in outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_same, numbers
from torch import Tensor

from bench.measure.memory import LiveStorage
from variants.ops.convolutions import short_convolution
from variants.ops.recurrences.gated_norm import GatedNorm, gated_norm
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
    return found if form.gate_first else found * gate


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("piece", [1, 2**20])
def test_it_is_the_norm_of_torch_times_a_gate(
    form: GatedNorm, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in several, which do not divide the tokens; for vectors in the order of heads."""
    monkeypatch.setattr(short_convolution, "PIECE", Sizes(piece, piece))
    monkeypatch.setattr(short_convolution, "PIECES", 3)
    y, z, weight = numbers(2, 3, 5, 8).transpose(1, 2), numbers(2, 5, 24, seed=2), numbers(8, seed=3)
    assert_same(
        lambda: gated_norm(form, y, z, weight, device_type="cpu"),
        lambda: by_torch(form, y, z, weight),
        [y, z, weight],
    )


def test_no_weight_is_a_weight_of_one() -> None:
    form = GatedNorm("silu", centred=True)
    y, z = numbers(2, 5, 3, 8), numbers(2, 5, 24)
    assert_same(
        lambda: gated_norm(form, y, z, device_type="cpu"),
        lambda: gated_norm(form, y, z, torch.ones(8, dtype=y.dtype), device_type="cpu"),
        [y, z],
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form.activation == "silu"])
def test_without_a_gate_it_is_the_norm_of_torch(form: GatedNorm) -> None:
    y, weight = numbers(2, 5, 3, 8), numbers(8, seed=3)
    norm = F.layer_norm if form.centred else F.rms_norm
    assert_same(
        lambda: gated_norm(form, y, weight=weight, device_type="cpu"),
        lambda: norm(y, [8], weight, eps=form.eps),
        [y, weight],
    )


def test_the_result_has_the_dtype_of_the_gate_or_the_one_that_is_asked_for() -> None:
    y, z = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 12).bfloat16()
    assert gated_norm(GatedNorm(), y, z, device_type="cpu").dtype is torch.bfloat16
    assert gated_norm(GatedNorm(), y, device_type="cpu").dtype is torch.float32
    assert gated_norm(GatedNorm(), y, z, dtype=torch.float64, device_type="cpu").dtype is torch.float64


def test_only_inputs_are_saved() -> None:
    y, z = torch.randn(1, 64, 2, 4, requires_grad=True), torch.randn(1, 64, 8, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    with LiveStorage() as storage:
        out = gated_norm(GatedNorm(), y, z, weight, device_type="cpu")
        assert storage.live <= sum(t.nbytes for t in (y, z, weight, out))


def test_a_vector_of_zeros_has_a_finite_gradient() -> None:
    y = torch.zeros(1, 1, 2, 4, requires_grad=True)
    out = gated_norm(GatedNorm("silu"), y, torch.ones(1, 1, 8), device_type="cpu")
    assert torch.equal(out, torch.zeros_like(out))
    (gradient,) = torch.autograd.grad(out.sum(), y)
    assert gradient.isfinite().all()
