"""FNet against torch's complex transform, its symmetries, and its FLOPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import EXACT, assert_same, difference, numbers
from torch import Tensor

import variants
from bench.measure.flops import CountFlops
from variants.attention.fnet import Fnet, FnetConfig
from variants.base import Context, Workload
from variants.ops.fourier import fft_flops

SMALL: list[dict[str, Any]] = [{"norm": "none"}]


def dims_of(seq_len: int, d_model: int = 16) -> Workload:
    return Workload(causal=False, batch_size=1, seq_len=seq_len, d_model=d_model, heads=2)


def run(x: Tensor, **knobs: Any) -> Tensor:
    layer = Fnet(FnetConfig(**knobs), dims_of(x.shape[1], x.shape[2]))
    return layer(x, Context(causal=False)).y


def test_it_is_registered() -> None:
    assert variants.load("fnet") is Fnet


@pytest.mark.parametrize("norm", ["ortho", "none"])
@pytest.mark.parametrize(("seq_len", "channels"), [(1, 4), (2, 4), (7, 4), (8, 12), (97, 16), (64, 8)])
def test_it_is_the_real_part_of_the_complex_transform(seq_len: int, channels: int, norm: str) -> None:
    x = numbers(3, seq_len, channels)
    scale = math.sqrt(seq_len * channels) if norm == "ortho" else 1.0
    assert_same(
        lambda: run(x, norm=norm),
        lambda: torch.fft.fft(torch.fft.fft(x.to(torch.complex128), dim=2), dim=1).real / scale,
        [x],
    )


def test_one_token_is_spread_to_all_as_a_cosine() -> None:
    x = torch.zeros(1, 12, 8, dtype=torch.float64)
    x[0, 3, 0] = 1.0
    want = torch.cos(2 * torch.pi * 3 * torch.arange(12, dtype=torch.float64) / 12)
    assert difference(run(x, norm="none")[0], want[:, None].expand(-1, 8)) <= EXACT


def test_twice_is_the_even_part() -> None:
    """The mean of the sequence and of its reflection about the first token and channel."""
    x = numbers(2, 9, 8).detach()
    reflected = x.roll(-1, 1).flip(1).roll(-1, 2).flip(2)
    assert difference(run(run(x)), (x + reflected) / 2) <= EXACT


def test_its_own_transpose_is_its_gradient() -> None:
    x, g = numbers(2, 11, 8), numbers(2, 11, 8).detach()
    (grad,) = torch.autograd.grad(run(x), x, g)
    assert difference(grad, run(g)) <= EXACT


def test_nothing_is_saved_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(numbers(1, 40, 16))
    assert saved == []


def test_bfloat16_is_computed_in_float32() -> None:
    x = numbers(1, 300, 16).detach().bfloat16()
    y = run(x)
    assert y.dtype == torch.bfloat16
    assert difference(y.double(), run(x.double())) <= 2**-8


def test_a_fast_transform_of_a_power_of_two_counts_its_butterflies() -> None:
    """Ten operations for each of N/2 butterflies in each of log₂ N stages."""
    assert fft_flops(3, 8) == 3 * (8 // 2) * 3 * 10


@pytest.mark.parametrize("seq_len", [64, 300])
def test_counted_flops_are_those_of_the_formula(seq_len: int) -> None:
    x = torch.randn(2, seq_len, 16, requires_grad=True)
    with CountFlops() as counter:
        y = run(x)
    cost = Fnet(FnetConfig(), dims_of(seq_len)).cost(
        Workload(causal=False, batch_size=2, seq_len=seq_len, d_model=16, heads=2)
    )
    assert counter.total == cost.total
    with CountFlops() as counter:
        y.sum().backward()
    assert counter.total == cost.step - cost.total


def test_causal_is_refused_with_the_reason() -> None:
    reason = Fnet.unsupported(FnetConfig(), dims_of(40), causal=True)
    assert reason is not None
    assert "sum over all tokens" in reason
