"""Random feature attention against the kernel that it estimates, its quadratic form and its gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import EXACT, assert_same, difference, numbers, rotated
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.rfa import Rfa, RfaConfig
from variants.base import Context, Workload
from variants.ops.features.unit_vectors import unit_vectors
from variants.ops.recurrences import scan_chunks

SMALL: list[dict[str, Any]] = [
    {"n_features": 8, "gate": True, "chunk": 16},
    {"n_features": 6, "floor": 0.5, "chunk": 16},
]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, **knobs: Any) -> Rfa:
    torch.manual_seed(0)
    return Rfa(RfaConfig(**{"n_features": 64, **knobs}), dims_of(seq_len)).double()


def kernel_attention(layer: Rfa, x: Tensor, *, causal: bool) -> Tensor:
    """Attention with the weights exp(−|σ(q̂ − k̂)|²/2), which the features estimate."""
    shape = (*x.shape[:2], layer.dims.heads, -1)
    q, k, v = ((x @ w.T).reshape(shape) for w in layer.projections.qkv.weight.chunk(3))
    q, k = (F.normalize(rotated(t), dim=-1) * layer.scale[:, 0] for t in (q, k))
    weights = (-(q[:, :, None] - k[:, None]).square().sum(-1) / 2).exp().permute(0, 3, 1, 2)
    if causal:
        weights = weights.tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ layer.projections.out.weight.T


def test_it_is_registered() -> None:
    assert variants.load("rfa") is Rfa


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_falls_with_the_root_of_the_number_of_features(causal: bool) -> None:
    x = numbers(2, 40, 16).detach()
    errors = []
    for n_features in (2**8, 2**14):
        layer = make(40, n_features=n_features)
        want = kernel_attention(layer, x, causal=causal)
        errors.append((layer(x, Context(causal=causal)).y - want).square().mean().sqrt().item())
    assert errors[1] < 0.02
    assert 4 < errors[0] / errors[1] < 16  # 8 = √(2¹⁴/2⁸)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 64), (41, 8), (70, 64)])
def test_it_equals_the_recurrence_of_the_paper(seq_len: int, chunk: int, gate: bool) -> None:
    """Token by token, with outputs of the features written out."""
    layer = make(seq_len, gate=gate, chunk=chunk, n_features=1024)  # no denominator is near 0
    x = numbers(2, seq_len, 16)
    table = layer.directions.double()

    def recurrence() -> Tensor:
        q, k, v = layer.projections.split(x)
        q, k = (F.normalize(t, dim=-1) * layer.scale @ table.T for t in (q, k))
        q, k = (torch.cat([t.sin(), t.cos()], -1) for t in (q, k))
        sums, norms = x.new_zeros(2, 2, 1024, 8), x.new_zeros(2, 2, 1024)
        outputs = []
        for t in range(seq_len):
            g = x.new_ones(2, 2, 1)
            w = g
            if layer.gate is not None:
                g = layer.gate(x[:, t]).sigmoid()[..., None]
                w = 1 - g
            sums = g[..., None] * sums + einsum("bhm,bhd->bhmd", w * k[:, :, t], v[:, :, t])
            norms = g * norms + w * k[:, :, t]
            found = einsum("bhm,bhmd->bhd", q[:, :, t], sums)
            outputs.append(found / (q[:, :, t] * norms).sum(-1, keepdim=True))
        return layer.projections.merge(torch.stack(outputs, 2))

    inputs = [x, *layer.parameters()]
    assert_same(lambda: layer(x, Context(causal=True)).y, recurrence, inputs)


def test_a_gate_that_forgets_nothing_changes_nothing() -> None:
    """All keys have the same small weight, which the denominator cancels."""
    x, plain, gated = numbers(2, 75, 16).detach(), make(75), make(75, gate=True)
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert gated.gate is not None
    with torch.no_grad():
        gated.gate.weight.zero_()
        gated.gate.bias.fill_(25.0)
    ys = [layer(x, Context(causal=True)).y for layer in (plain, gated)]
    assert difference(*ys) <= 1e-7


def test_a_gate_that_forgets_everything_returns_the_own_value() -> None:
    layer, x = make(40, gate=True), numbers(1, 40, 16).detach()
    assert layer.gate is not None
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(-40.0)
        layer.projections.qkv.weight[16:32] = layer.projections.qkv.weight[:16]  # own kernel 1, not below
    want = layer.projections.out(x @ layer.projections.qkv.weight[32:].T)
    assert difference(layer(x, Context(causal=True)).y, want) <= EXACT


def test_no_output_is_larger_than_the_floor_allows() -> None:
    """A scale at which the kernel is 0 for all pairs but estimates are noise: denominators of both signs."""
    layer, x = make(300, n_features=8, floor=0.1), numbers(1, 300, 16).detach()
    with torch.no_grad():
        layer.scale.fill_(50.0)
        layer.projections.out.weight.copy_(torch.eye(16))
        values = x @ layer.projections.qkv.weight[32:].T
        for causal in (True, False):
            y = layer(x, Context(causal=causal)).y
            assert y.isfinite().all()
            assert y.abs().max() <= values.abs().max() / 0.1


def test_a_gate_has_no_bidirectional_form() -> None:
    reason = Rfa.unsupported(RfaConfig(gate=True), dims_of(40), causal=False)
    assert reason is not None
    assert "gate=true" in reason
    with pytest.raises(ValueError, match="gate=true"):
        make(40, gate=True)(torch.randn(1, 40, 16).double(), Context(causal=False))


def test_unit_vectors_and_their_gradient() -> None:
    x, scale = numbers(2, 3, 5, 4), numbers(3, 1, 4)
    assert_same(lambda: unit_vectors(x, scale), lambda: F.normalize(x, dim=-1) * scale, [x, scale])
    with torch.no_grad():
        x[0, 0, 0] = 0
    (grad,) = torch.autograd.grad(unit_vectors(x, scale).sum(), x)
    assert grad.isfinite().all()


def test_a_sum_over_the_whole_chunk_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decays from later keys are not masked."""
    make_decay = scan_chunks.Decay.make

    def unmasked(log_decay: Tensor, sequences: int) -> scan_chunks.Decay:
        decay = make_decay(log_decay, sequences)
        return decay._replace(within=torch.ones_like(decay.within))

    monkeypatch.setattr(scan_chunks.Decay, "make", unmasked)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Rfa, RfaConfig(gate=True), dims_of(75, 2), 2, CPU)
