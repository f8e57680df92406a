"""Linear attention with elu + 1 against its quadratic form and its recurrence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import EXACT, assert_same, difference, numbers, rotated
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.linear_transformer import LinearTransformer, LinearTransformerConfig
from variants.base import Context, Workload
from variants.ops.recurrences import scan_chunks
from variants.ops.recurrences.gated_scan import gated_scan
from variants.ops.recurrences.scan_features import EluPlusOne

SMALL: list[dict[str, Any]] = [{"chunk": 16}]

CPU = torch.device("cpu")


def dims_of(seq_len: int, batch_size: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch_size, seq_len=seq_len, d_model=16, heads=2)


def make(seq_len: int, **knobs: int) -> LinearTransformer:
    torch.manual_seed(0)
    return LinearTransformer(LinearTransformerConfig(**knobs), dims_of(seq_len)).double()


def oracle(layer: LinearTransformer, x: Tensor, *, causal: bool) -> Tensor:
    """Pair by pair, with nothing of the layer but its weights."""
    shape = (*x.shape[:2], layer.dims.heads, -1)
    q, k, v = ((x @ w.T).reshape(shape) for w in layer.projections.qkv.weight.chunk(3))
    q, k = (F.elu(rotated(t)) + 1 for t in (q, k))
    weights = einsum("bihd,bjhd->bhij", q, k)
    if causal:
        weights = weights.tril()
    weights = weights / weights.sum(-1, keepdim=True)
    return einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ layer.projections.out.weight.T


def test_it_is_registered() -> None:
    assert variants.load("linear_transformer") is LinearTransformer


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "chunk"), [(1, 64), (9, 64), (67, 8), (130, 64)])
def test_it_equals_its_quadratic_form(seq_len: int, chunk: int, causal: bool) -> None:
    layer, x = make(seq_len, chunk=chunk), numbers(2, seq_len, 16)
    assert_same(
        lambda: layer(x, Context(causal=causal)).y,
        lambda: oracle(layer, x, causal=causal),
        [x, *layer.parameters()],
    )


def test_the_chunk_changes_no_output() -> None:
    x = numbers(2, 75, 16).detach()
    ys = [make(75, chunk=chunk)(x, Context(causal=True)).y for chunk in (1, 7, 64, 1000)]
    assert all(difference(y, ys[0]) <= EXACT for y in ys)


def test_equal_keys_average_the_values() -> None:
    """Without differences between keys the output is a mean of all values so far."""
    layer, x = make(33, chunk=8), numbers(1, 33, 16).detach()
    with torch.no_grad():
        layer.projections.qkv.weight[16:32] = 0
    values = x @ layer.projections.qkv.weight[32:].T
    means = values.cumsum(1) / torch.arange(1, 34)[:, None]
    want = means @ layer.projections.out.weight.T
    assert difference(layer(x, Context(causal=True)).y, want) <= EXACT


def test_large_negative_keys_leave_a_finite_output() -> None:
    """In float32 elu(x) + 1 would be 0 for all features, and the output NaN."""
    q, k, v = make(40).float().projections.split(torch.randn(1, 40, 16))
    keys = k - 25
    y = gated_scan(q, keys, v, features=EluPlusOne(), normalise=True, chunk=8, device_type="cpu")
    assert y.isfinite().all()
    assert y.abs().max() <= v.abs().max() * 1.001


def test_a_sum_over_the_whole_chunk_fails_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of pairs within a chunk is left out."""
    monkeypatch.setattr(scan_chunks, "_masked", lambda weights, decay: weights)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(LinearTransformer, LinearTransformerConfig(), dims_of(75, 2), 2, CPU)
