"""The scan with a decay of each channel against the recurrence that defines it."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same, difference, numbers
from torch import Tensor

from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants.ops.recurrences import channel_chunks, feature_sums
from variants.ops.recurrences.channel_chunks import Logarithm, SigmoidRoot
from variants.ops.recurrences.channel_scan import channel_recurrence, channel_scan, channel_scan_flops
from variants.ops.recurrences.gated_scan import gated_scan
from variants.ops.recurrences.scan_features import Identity
from variants.ops.tile_size import Sizes

LENGTHS = [(1, 8), (2, 8), (5, 8), (16, 8), (67, 8), (40, 64), (45, 64), (100, 37)]
"""Tokens, and tokens of a chunk: powers of two, odd numbers, and blocks with shorter right halves."""


def scan(q: Tensor, k: Tensor, v: Tensor, logs: Tensor, chunk: int = 64) -> Tensor:
    return channel_scan(q, k, v, logs, decay=Logarithm(), chunk=chunk, device_type="cpu")


def drawn(seq_len: int) -> list[Tensor]:
    """Queries, keys, and values of another width."""
    return [numbers(2, 3, seq_len, width, seed=width) for width in (6, 6, 4)]


@pytest.mark.parametrize(("seq_len", "chunk"), LENGTHS)
@pytest.mark.parametrize("segment", [1, 2**20])
def test_it_is_the_recurrence(
    seq_len: int, chunk: int, segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one segment and in many, from no decay to nearly all."""
    monkeypatch.setattr(channel_chunks, "SEGMENT", Sizes(segment, segment))
    inputs = drawn(seq_len)
    logs = (-(2 * numbers(2, 3, seq_len, 6)).exp()).detach().requires_grad_()
    assert_same(
        lambda: scan(*inputs, logs, chunk), lambda: channel_recurrence(*inputs, logs), [*inputs, logs]
    )


@pytest.mark.parametrize("power", [0.0, -1e-6, -0.01, -1.0, -30.0, -300.0, float("-inf")])
def test_no_decay_is_too_weak_or_too_strong(power: float) -> None:
    """In float32, among decays of other sizes: outputs and gradients, relative to the largest entry."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 8, generator=source) for _ in range(3))
    logs = torch.full((1, 2, 200, 8), power)
    logs[:, :, ::7, 1::2] = -0.5
    logs[:, 1, :, 3] = 0.0
    logs[:, :, 100, 5] = float("-inf")
    inputs = [x.requires_grad_() for x in (q, k, v, logs)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got, want = scan(*inputs), channel_recurrence(*wide)
    direction = torch.randn(want.shape, generator=source)
    found = torch.autograd.grad(got, inputs, direction)
    wanted = torch.autograd.grad(want, wide, direction.double())
    for a, b in zip((got, *found), (want, *wanted), strict=True):
        assert a.isfinite().all()
        assert (a - b.nan_to_num()).abs().max() <= 1e-5 * max(1.0, b.nan_to_num().abs().max())


def test_equal_decays_of_all_channels_are_those_of_the_scalar_scan() -> None:
    inputs, logs = drawn(70), (-numbers(2, 3, 70, 1).exp()).detach().requires_grad_()
    assert_same(
        lambda: scan(*inputs, logs.expand(-1, -1, -1, 6)),
        lambda: gated_scan(*inputs, logs, features=Identity(), chunk=16, device_type="cpu"),
        [*inputs, logs],
    )


def test_the_root_of_a_sigmoid() -> None:
    """Also where the sigmoid underflows in float32."""
    inputs, x = drawn(30), (20 * numbers(2, 3, 30, 6)).detach().requires_grad_()
    assert_same(
        lambda: channel_scan(*inputs, x, decay=SigmoidRoot(16), chunk=8, device_type="cpu"),
        lambda: channel_recurrence(*inputs, x.sigmoid().log() / 16),
        [*inputs, x],
    )
    low = SigmoidRoot(16).logs(torch.tensor([-200.0]))
    assert difference(low, torch.tensor([-12.5])) <= 1e-6


def test_bfloat16_inputs_have_float32_sums() -> None:
    """Against the recurrence of the same rounded inputs: only the output is rounded."""
    q, k, v = (x.detach().bfloat16() for x in drawn(300))
    logs = torch.full((2, 3, 300, 6), -0.001)
    got = scan(q, k, v, logs)
    assert got.dtype == torch.bfloat16
    want = channel_recurrence(*(x.double() for x in (q, k, v, logs)))
    assert difference(got.double(), want) <= 2**-8


def saved_bytes(seq_len: int) -> int:
    """Bytes that a forward pass keeps, apart from inputs and outputs."""
    tensors = [torch.zeros(1, 2, seq_len, 32, requires_grad=True) for _ in range(4)]
    with LiveStorage() as storage:
        y = scan(*tensors, chunk=8)
        return storage.live - sum(x.nbytes for x in (*tensors, y))


def test_the_saved_states_are_constant_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_chunks, "SEGMENT", Sizes(2**10, 2**10))
    monkeypatch.setattr(feature_sums, "SEGMENTS", 6)
    assert saved_bytes(2**9) == saved_bytes(2**11) <= 6 * 2 * 32 * 32 * 4


@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 8), (100, 64), (300, 64), (77, 100)])
def test_dispatched_flops_are_at_most_twice_the_formula(seq_len: int, chunk: int) -> None:
    tensors = [torch.zeros(2, 3, seq_len, 16) for _ in range(4)]
    with CountFlops() as counter:
        scan(*tensors, chunk=chunk)
    formula = 6 * channel_scan_flops(seq_len, 16, 16, chunk=chunk)
    assert formula <= counter.total <= 2 * formula
