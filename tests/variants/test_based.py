"""The linear attention of Based against its kernel, its limits and softmax attention, which it estimates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import (
    D_MODEL,
    HEADS,
    assert_same,
    difference,
    dims_for,
    everything,
    make_layer,
    numbers,
    rotated,
    softmax_attention,
)
from torch import Tensor, einsum

import variants
from bench.measure import gates
from variants.attention.based import Based, BasedConfig
from variants.base import Context
from variants.ops.recurrences import scan_chunks

SMALL: list[dict[str, Any]] = [{"feature_channels": 4, "chunk": 16}]


def make(seq_len: int, **knobs: Any) -> Based:
    layer = make_layer(Based, BasedConfig(**{"feature_channels": 4, **knobs}), dims_for(seq_len))
    assert isinstance(layer, Based)
    return layer


def projected(layer: Based, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, T, H, ·)."""
    q, k = ((x @ w.T).unflatten(-1, (HEADS, -1)) for w in layer.qk.weight.chunk(2))
    return rotated(q), rotated(k), (x @ layer.v.weight.T).unflatten(-1, (HEADS, -1))


def test_it_is_registered() -> None:
    assert variants.load("based") is Based


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seq_len", "chunk", "channels"), [(1, 64, 4), (41, 8, 2), (70, 64, 6)])
def test_it_is_attention_with_the_series_of_the_exponential(
    seq_len: int, chunk: int, channels: int, causal: bool
) -> None:
    layer = make(seq_len, chunk=chunk, feature_channels=channels)
    x = numbers(2, seq_len, D_MODEL)

    def quadratic() -> Tensor:
        q, k, v = projected(layer, x)
        scores = einsum("bihd,bjhd->bhij", q, k) / channels**0.5
        weights = (0.5 + 0.5 * (1 + scores) ** 2) * everything(seq_len, causal=causal)
        y = einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v)
        return y.flatten(2) @ layer.out.weight.T

    assert_same(lambda: layer(x, Context(causal=causal)).y, quadratic, [x, *layer.parameters()])


@pytest.mark.parametrize("causal", [True, False])
def test_the_error_to_softmax_falls_with_the_third_power_of_the_scores(causal: bool) -> None:
    layer, x = make(50), numbers(1, 50, D_MODEL).detach()
    errors = []
    with torch.no_grad():
        for size in (0.2, 0.1):
            layer.qk.weight.normal_(generator=torch.Generator().manual_seed(0)).mul_(size / 4)
            y = softmax_attention(*projected(layer, x), everything(50, causal=causal))
            want = y.flatten(2) @ layer.out.weight.T
            errors.append(difference(layer(x, Context(causal=causal)).y, want))
    # a score is a product of two sizes
    assert 40 < errors[0] / errors[1] < 100


def test_queries_of_zero_average_the_values() -> None:
    layer, x = make(30), numbers(1, 30, D_MODEL).detach()
    with torch.no_grad():
        layer.qk.weight[:8] = 0
        values = x @ layer.v.weight.T
        want = values.cumsum(1) / torch.arange(1, 31, dtype=x.dtype)[:, None] @ layer.out.weight.T
    assert difference(layer(x, Context(causal=True)).y, want) <= 1e-9


def test_weights_of_later_keys_fail_the_causality_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_chunks, "_masked", lambda weights, decay: weights)
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(Based, BasedConfig(), dims_for(75, 2), 2, torch.device("cpu"))
