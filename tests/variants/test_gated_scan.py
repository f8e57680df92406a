"""The chunked scan against the recurrence that defines it, in outputs, gradients, memory and FLOPs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.measure.flops import CountFlops
from bench.measure.memory import LiveStorage
from variants.ops.recurrences import feature_sums, scan_chunks
from variants.ops.recurrences import full_sums as full_sums_module
from variants.ops.recurrences.full_sums import full_flops, full_sums
from variants.ops.recurrences.gated_scan import gated_scan, recurrence, scan_flops
from variants.ops.recurrences.scan_features import (
    EluPlusOne,
    FeatureMap,
    Identity,
    Silu,
    SinesAndCosines,
    Taylor,
)
from variants.ops.tile_size import Sizes

EXACT = 1e-10
CHUNK = 8


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    """Outputs and gradients."""
    direction = torch.randn_like(want)
    for a, b in zip(
        (got, *torch.autograd.grad(got, inputs, direction, retain_graph=True)),
        (want, *torch.autograd.grad(want, inputs, direction)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("decays", "weighted", "normalise"), [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("seq_len", [1, 5, 16, 67])
@pytest.mark.parametrize("segment", [2**7, 2**20])
def test_it_is_the_recurrence(
    seq_len: int,
    segment: int,
    decays: bool,
    weighted: bool,
    normalise: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With values of another width than keys, in one segment and in many."""
    monkeypatch.setattr(scan_chunks, "SEGMENT", Sizes(segment, segment))
    torch.manual_seed(seq_len)
    q, k, v = numbers(2, 3, seq_len, 6), numbers(2, 3, seq_len, 6), numbers(2, 3, seq_len, 4)
    q_used, k_used = (q.exp(), k.exp()) if normalise else (q, k)  # positive weights
    # from none to nearly all
    log_decay = (-numbers(2, 3, seq_len, 1).exp()).detach().requires_grad_() if decays else None
    weight = numbers(2, 3, seq_len, 1).detach().exp().requires_grad_() if weighted else None
    # between the normalisers of the tokens
    least = torch.full((2, 3, seq_len, 1), 30.0, dtype=torch.float64) if normalise and weighted else None
    got = gated_scan(
        q_used,
        k_used,
        v,
        log_decay,
        weight,
        features=Identity(),
        normalise=normalise,
        least=least,
        chunk=CHUNK,
        device_type="cpu",
    )
    want = recurrence(q_used, k_used, v, log_decay, weight, normalise=normalise, least=least)
    assert_equal(got, want, [x for x in (q, k, v, log_decay, weight) if x is not None])


@pytest.mark.parametrize("log_decay", [0.0, -1e-12, -1.0, -80.0, -3000.0, float("-inf")])
def test_no_decay_is_too_weak_or_too_strong(log_decay: float) -> None:
    """In float32, among decays of another size. From cumulative sums to own keys only."""
    q, k, v = (torch.randn(1, 2, 3 * CHUNK, 4, requires_grad=True) for _ in range(3))
    logs = torch.full((1, 2, 3 * CHUNK, 1), log_decay)
    logs[:, 1, ::5] = -0.5
    logs.requires_grad_()
    got = gated_scan(q, k, v, logs, features=Identity(), chunk=CHUNK, device_type="cpu")
    want = recurrence(*(x.double() for x in (q, k, v, logs)))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(got.sum(), [q, k, v, logs])
    assert all(g.isfinite().all() for g in gradients)
    finite = logs.detach().clamp(min=-1e4).double().requires_grad_()
    wanted = torch.autograd.grad(
        recurrence(*(x.double() for x in (q, k, v)), finite).sum(), [q, k, v, finite]
    )
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


def test_a_strong_decay_leaves_the_next_tokens_exact() -> None:
    """Cumulative logarithms near -6000, whose float32 rounding would change weights by 5e-4."""
    logs = torch.full((1, 1, 64, 1), -0.01)
    logs[:, :, :60] = -100.0
    q, k, v = (torch.rand(1, 1, 64, 4) for _ in range(3))
    got = gated_scan(q, k, v, logs, features=Identity(), chunk=64, device_type="cpu")
    want = recurrence(*(x.double() for x in (q, k, v, logs)))
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def taylor(x: Tensor) -> Tensor:
    """Four channels: six pairs, by their distance 1, and then 2."""
    u = x / 2**0.5
    pairs = [u[..., i] * u[..., j] for i, j in ((0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (1, 3))]
    return torch.cat([torch.ones_like(u[..., :1]), u, u * u / 2**0.5, torch.stack(pairs, -1)], -1)


TABLE = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MAPS: list[tuple[FeatureMap, Tensor | None, Callable[[Tensor], Tensor]]] = [
    (Identity(), None, lambda x: x),
    (Silu(), None, lambda x: x / (1 + (-x).exp())),
    (EluPlusOne(), None, lambda x: torch.nn.functional.elu(x) + 1),
    (Taylor(), None, taylor),
    (
        SinesAndCosines(),
        0.1 * TABLE,
        lambda x: torch.cat([(x @ TABLE.T / 10).sin(), (x @ TABLE.T / 10).cos()], -1) / 7**0.5,
    ),
]
"""With their tables, and written out."""


@pytest.mark.parametrize(("features", "table", "written_out"), MAPS)
def test_feature_maps_state_their_derivative(
    features: FeatureMap, table: Tensor | None, written_out: Callable[[Tensor], Tensor]
) -> None:
    x = (3 * numbers(2, 5, 4)).detach().requires_grad_()
    want = written_out(x)
    found = features.features(x.detach(), table)
    torch.testing.assert_close(found, want.detach())
    assert found.shape[-1] == features.width(4, table)
    direction = torch.randn_like(found)
    got = features.gradient(direction.clone(), found, x.detach(), table)
    torch.testing.assert_close(got, torch.autograd.grad(want, x, direction)[0])


def test_elu_plus_one_is_positive_where_the_sum_is_rounded_to_0() -> None:
    x = torch.tensor([[[-80.0, -20.0, -1.0, 0.0, 2.0]]])
    found = EluPlusOne().features(x, None)
    assert (found > 0).all()
    torch.testing.assert_close(found[..., 2:], torch.nn.functional.elu(x[..., 2:]) + 1)


@pytest.mark.parametrize(("features", "table", "written_out"), MAPS[2:])
@pytest.mark.parametrize("seq_len", [1, 7, 40])
def test_full_sums_are_the_quadratic_form(
    features: FeatureMap,
    table: Tensor | None,
    written_out: Callable[[Tensor], Tensor],
    seq_len: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(full_sums_module, "SEGMENT", Sizes(2**7, 2**7))
    torch.manual_seed(seq_len)
    q, k, v = numbers(2, 3, seq_len, 4), numbers(2, 3, seq_len, 4), numbers(2, 3, seq_len, 5)
    got = full_sums(q, k, v, features=features, table=table, device_type="cpu")
    weights = written_out(q) @ written_out(k).mT
    assert_equal(got, weights / weights.sum(-1, keepdim=True) @ v, [q, k, v])


@pytest.mark.parametrize("head_dim", [2, 4, 6, 16])
def test_taylor_features_are_the_series_of_the_exponential(head_dim: int) -> None:
    """Outputs and gradients of their scalar products."""
    q, k = numbers(3, 5, head_dim), numbers(3, 5, head_dim)
    scores = (q * k).sum(-1) / head_dim**0.5
    found = [Taylor().features(x.detach(), None) for x in (q, k)]
    torch.testing.assert_close((found[0] * found[1]).sum(-1), 1 + scores + scores.square() / 2)
    wanted = torch.autograd.grad((1 + scores + scores.square() / 2).sum(), q)[0]
    torch.testing.assert_close(Taylor().gradient(found[1], found[0], q.detach(), None), wanted)


def saved_bytes(seq_len: int) -> int:
    """Bytes that a forward pass keeps, apart from what is of the size of its inputs."""
    shape = 1, 2, seq_len, 32
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    logs = torch.zeros(1, 2, seq_len, 1, requires_grad=True)
    with LiveStorage() as storage:
        y = gated_scan(q, k, v, logs, features=EluPlusOne(), normalise=True, chunk=8, device_type="cpu")
        normaliser_bytes = logs.nbytes
        return storage.live - sum(x.nbytes for x in (q, k, v, logs, y)) - normaliser_bytes


def test_the_saved_states_are_constant_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_chunks, "SEGMENT", Sizes(2**10, 2**10))
    monkeypatch.setattr(feature_sums, "SEGMENTS", 6)
    state_bytes = 2 * 32 * 33 * 4
    assert saved_bytes(2**9) == saved_bytes(2**11) <= 6 * state_bytes


@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 8), (100, 64), (300, 64), (1111, 64), (77, 100)])
def test_dispatched_flops_are_at_most_twice_the_formula(seq_len: int, chunk: int) -> None:
    q, k, v = (torch.randn(2, 3, seq_len, 16) for _ in range(3))
    with CountFlops() as counter:
        gated_scan(q, k, v, features=EluPlusOne(), normalise=True, chunk=chunk, device_type="cpu")
    formula = 6 * scan_flops(seq_len, 16, 17, chunk=chunk)
    assert formula <= counter.total <= 2.1 * formula
    with CountFlops() as counter:
        full_sums(q, k, v, features=EluPlusOne(), device_type="cpu")
    assert counter.total == 6 * full_flops(seq_len, 16, 17)
