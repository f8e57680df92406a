"""The chunked delta rule against the recurrence that defines it, and what the rule promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants.ops.recurrences import delta_rule as module
from variants.ops.recurrences import feature_sums
from variants.ops.recurrences.delta_rule import delta_flops, delta_rule, recurrence
from variants.ops.recurrences.gated_scan import gated_scan
from variants.ops.recurrences.scan_features import Identity
from variants.ops.tile_size import Sizes

EXACT = 1e-10
CHUNK = 8
DEVICES = ("cpu", "cuda")
"""Types of device: the states of chunks follow in order, and in a tree."""


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def run(*tensors: Tensor | None, device_type: str = "cpu", **options: bool) -> Tensor:
    return delta_rule(*tensors, chunk=CHUNK, device_type=device_type, **options)  # type: ignore[arg-type]


def assert_equal(got: Tensor, want: Tensor, inputs: list[Tensor], tolerance: float = EXACT) -> None:
    """Outputs and gradients, relative to the largest."""
    direction = torch.randn_like(want)
    grads = torch.autograd.grad(got, inputs, direction.to(got.dtype), retain_graph=True)
    wanted = torch.autograd.grad(want, inputs, direction)
    for a, b in zip((got, *grads), (want, *wanted), strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


def drawn(seq_len: int, *, decays: int, widths: tuple[int, int] = (6, 4)) -> list[Tensor]:
    """Queries, unit keys, values of another width, strengths and, if any, decays from none to all."""
    torch.manual_seed(seq_len)
    q, k, v = (numbers(2, 3, seq_len, width) for width in (widths[0], *widths))
    beta = torch.rand(2, 3, seq_len, 1, dtype=torch.float64, requires_grad=True)
    found = [q, unit(k).detach().requires_grad_(), v, beta]
    if decays:
        found.append((-numbers(2, 3, seq_len, decays).exp()).detach().requires_grad_())
    return found


@pytest.mark.parametrize("decays", [0, 1, 6])
@pytest.mark.parametrize("seq_len", [1, 5, 16, 67])
@pytest.mark.parametrize("segment", [2**7, 2**20])
@pytest.mark.parametrize("device_type", DEVICES)
def test_it_is_the_recurrence(
    seq_len: int, segment: int, decays: int, device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one segment and in many."""
    monkeypatch.setattr(module, "SEGMENT", Sizes(segment, segment))
    inputs = drawn(seq_len, decays=decays)
    assert_equal(run(*inputs, device_type=device_type), recurrence(*inputs), inputs)


def test_unit_vectors_are_part_of_it() -> None:
    """Also where a vector is 0."""
    q, k, *others = drawn(19, decays=1)
    with torch.no_grad():
        q[0, 0, 3] = k[0, 0, 5] = 0
        q.mul_(3)
        k.mul_(0.2)
    inputs = [q, k, *others]
    assert_equal(run(*inputs, unit=True), recurrence(unit(q), unit(k), *others), inputs)


@pytest.mark.parametrize("decays", [0, 1, 16])
def test_in_float32_it_is_near_the_recurrence(decays: int) -> None:
    """Of the largest number, 1e-5, over chunks of the default size, with keys that repeat."""
    inputs = [x.detach().float() for x in drawn(300, decays=decays, widths=(16, 16))]
    inputs[1][:, :, 1::2] = inputs[1][:, :, ::2]
    inputs = [x.requires_grad_() for x in inputs]
    got = delta_rule(*inputs, chunk=64, device_type="cpu")
    assert_equal(got, recurrence(*(x.double() for x in inputs)), inputs, 1e-5)


@pytest.mark.parametrize("decays", [1, 6])
@pytest.mark.parametrize("device_type", DEVICES)
def test_half_precision_has_no_nan(device_type: str, decays: int) -> None:
    inputs = [x.detach().bfloat16().requires_grad_() for x in drawn(70, decays=decays)]
    y = run(*inputs, unit=True, device_type=device_type)
    assert y.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in (y, *torch.autograd.grad(y.sum(), inputs)))


@pytest.mark.parametrize("log_decay", [0.0, -1e-12, -1.0, -80.0, -3000.0, float("-inf")])
@pytest.mark.parametrize("decays", [1, 6])
def test_no_decay_is_too_weak_or_too_strong(log_decay: float, decays: int) -> None:
    """In float32, among decays of another size."""
    q, k, v, beta = (x.detach().float().requires_grad_() for x in drawn(3 * CHUNK, decays=0))
    logs = torch.full((2, 3, 3 * CHUNK, decays), log_decay)
    logs[:, 1, ::5] = -0.5
    logs[:, 2, ::3, -1] = -0.5
    logs.requires_grad_()
    finite = logs.detach().clamp(min=-1e4).double().requires_grad_()
    want = recurrence(*(x.double() for x in (q, k, v, beta)), finite)
    got = run(q, k, v, beta, logs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.sum(), [q, k, v, beta, logs])
    wanted = torch.autograd.grad(want.sum(), [q, k, v, beta, finite])
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_equal_decays_of_all_channels_are_one_decay() -> None:
    """Outputs and gradients; that of the one decay is the sum over channels."""
    q, k, v, beta, logs = drawn(67, decays=1)
    inputs = [q, k, v, beta, logs]
    assert_equal(run(q, k, v, beta, logs.expand(-1, -1, -1, 6)), run(*inputs), inputs)


def test_a_strong_decay_leaves_the_next_tokens_exact() -> None:
    """Cumulative logarithms near -6000, whose float32 rounding would change weights by 5e-4."""
    q, k, v, beta = (x.detach().float() for x in drawn(64, decays=0))
    for decays in (1, 6):
        logs = torch.full((2, 3, 64, decays), -0.01)
        logs[:, :, :60] = -100.0
        got = delta_rule(q, k, v, beta, logs, chunk=64, device_type="cpu")
        want = recurrence(*(x.double() for x in (q, k, v, beta, logs)))
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("decays", [1, 6])
def test_the_gradient_of_a_strong_decay_is_of_its_own_size(decays: int) -> None:
    """About e⁻⁸ here. As a difference of two sums over the sequence it would be their rounding errors."""
    inputs = [x.detach().float() for x in drawn(200, decays=0)]
    logs = torch.full((2, 3, 200, decays), -8.0).requires_grad_()
    (got,) = torch.autograd.grad(run(*inputs, logs).sum(), logs)
    (want,) = torch.autograd.grad(recurrence(*(x.double() for x in inputs), logs.double()).sum(), logs)
    assert 0 < want.abs().max() < 0.1
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_without_writes_the_state_stays_empty() -> None:
    q, k, v, beta = drawn(30, decays=0)
    assert not run(q, k, v, torch.zeros_like(beta)).any()


def test_orthonormal_keys_recall_their_values() -> None:
    """As many as there are channels, exactly, in any later chunk; linear attention does so too."""
    keys, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    values = torch.randn(16, 5, dtype=torch.float64)
    k, v = keys.repeat(2, 1)[None, None], torch.cat([values, torch.zeros_like(values)])[None, None]
    beta = torch.ones(1, 1, 32, 1, dtype=torch.float64)
    beta[:, :, 16:] = 0
    y = run(k, k, v, beta)[0, 0]
    torch.testing.assert_close(y[:16], values)
    torch.testing.assert_close(y[16:], values)


def test_a_second_value_of_a_key_replaces_the_first() -> None:
    """Of a key that is written again, with other keys between; linear attention would return the sum."""
    keys, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    order = torch.tensor([*range(16), 3, 3, 7, 3])
    v = torch.randn(20, 5, dtype=torch.float64)
    k, beta = keys[order], torch.ones(20, 1, dtype=torch.float64)
    y = run(*(x[None, None] for x in (keys[3].expand(20, 16), k, v, beta)))[0, 0]
    last = {t: max((s for s in range(t + 1) if order[s] == 3), default=None) for t in range(20)}
    want = torch.stack([torch.zeros_like(v[0]) if s is None else v[s] for s in last.values()])
    torch.testing.assert_close(y, want)


def test_weak_writes_are_linear_attention() -> None:
    """With strengths εβ, y/ε tends to the sum of β (q·k) v with decays: what a write corrects is of order
    ε."""
    q, k, v, beta, logs = (x.detach() for x in drawn(40, decays=1))
    options = {"features": Identity(), "chunk": CHUNK, "device_type": "cpu"}
    want = gated_scan(q, k, v, logs, beta, **options)  # type: ignore[arg-type]
    errors = [(run(q, k, v, e * beta, logs) / e - want).abs().max().item() for e in (1e-2, 1e-4)]
    assert errors[0] > 1e-4
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.1)


def saved_bytes(seq_len: int) -> int:
    """Bytes that a forward pass keeps, apart from its inputs and outputs."""
    inputs = [x.detach().float().requires_grad_() for x in drawn(seq_len, decays=1, widths=(32, 32))]
    with LiveStorage() as storage:
        y = run(*inputs, unit=True)
        return storage.live - sum(x.nbytes for x in (*inputs, y))


def test_the_saved_states_are_constant_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT", Sizes(2**10, 2**10))
    monkeypatch.setattr(feature_sums, "SEGMENTS", 6)
    assert saved_bytes(2**8) == saved_bytes(2**9) <= 6 * (6 * 32 * 32 * 4)


@pytest.mark.parametrize("device_type", DEVICES)
@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 8), (100, 64), (300, 64), (1111, 64), (77, 100)])
def test_dispatched_flops_are_at_most_twice_the_formula(seq_len: int, chunk: int, device_type: str) -> None:
    q, k, v = (torch.randn(2, 3, seq_len, width) for width in (32, 32, 24))
    with CountFlops() as counter:
        delta_rule(q, k, v, torch.rand(2, 3, seq_len, 1), chunk=chunk, device_type=device_type)
    formula = 6 * delta_flops(seq_len, 32, 24, chunk=chunk)
    assert formula <= counter.total <= 2.1 * formula


class Products(TorchDispatchMode):
    """The number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "bmm" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_tree_has_few_launches() -> None:
    """Two products up and one down for each doubling forward, and five backward, in place of one a chunk."""
    counts = []
    for chunks in (16, 64):
        inputs = drawn(chunks * CHUNK, decays=1)
        with Products() as found:
            run(*inputs, device_type="cuda").sum().backward()
        counts.append(found.count)
    assert counts[1] - counts[0] == 8 * math.log2(64 / 16)
