"""Dense attention equals an independent oracle, and knows positions only by their distance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_same, difference, dims_for, everything, feed, make_layer, numbers, oracle

from variants.attention.dense import Dense, DenseConfig
from variants.base import Dims, Workload
from variants.ops.projections import Projections

SMALL: list[dict[str, Any]] = [{"impl": "naive"}, {"impl": "flash"}, {"impl": "math"}]

both_directions = pytest.mark.parametrize("causal", [True, False])
every_impl = pytest.mark.parametrize(
    "impl", ["sdpa", "naive", "flash", "math"]
)  # for the others see test_kernels.py


@every_impl
@both_directions
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(1, 80),
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    half=st.integers(1, 4),
)
@example(tokens=1, batch=1, heads=1, half=1)
def test_equals_the_oracle(impl: str, causal: bool, tokens: int, batch: int, heads: int, half: int) -> None:
    dims = Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=2 * half * heads, heads=heads)
    layer = make_layer(Dense, DenseConfig(impl=impl), dims)
    x = numbers(batch, tokens, dims.d_model)
    allowed = everything(tokens, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 30), shift=st.integers(1, 500))
@example(tokens=12, shift=20_000)
def test_scores_depend_on_relative_positions_alone(tokens: int, shift: int) -> None:
    """The same tokens later in a sequence have the same scores with one another."""
    torch.manual_seed(0)
    projections = Projections(Dims(seq_len=64, d_model=16, heads=2)).double()
    x = numbers(1, tokens, 16).detach()
    before = numbers(1, shift, 16, seed=5).detach()
    q, k, _ = projections.split(x)
    q_late, k_late, _ = (t[:, :, shift:] for t in projections.split(torch.cat([before, x], dim=1)))
    scores = q @ k.transpose(-1, -2)
    assert difference(q_late @ k_late.transpose(-1, -2), scores) < 1e-9


@both_directions
def test_order_of_the_tokens_matters(causal: bool) -> None:
    """Attention without positions would give the last of two queries the same output whatever comes first."""
    layer = make_layer(Dense, DenseConfig(), dims_for(8))
    x = numbers(1, 8, 16).detach()
    swapped = x[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    y, y_swapped = (feed(layer, given_x, causal=causal)[:, -1] for given_x in (x, swapped))
    assert difference(y_swapped, y) > 1e-4


@every_impl
@both_directions
@settings(deadline=None, max_examples=10)
@given(tokens=st.integers(1, 60))
def test_flops_count_the_pairs(impl: str, causal: bool, tokens: int) -> None:
    """Four products of D multiply-accumulates' worth for each pair of each head, and four projections."""
    dims = dims_for(tokens, 3)
    flops = make_layer(Dense, DenseConfig(impl=impl), dims).cost(replace(dims, causal=causal))
    pairs = int(everything(tokens, causal=causal).sum())
    assert flops.mixing == 3 * 2 * 2 * 16 * pairs
    assert flops.tokenwise == 3 * 2 * 4 * 16 * 16 * tokens


def test_state_is_the_keys_and_values_of_every_token() -> None:
    layer = make_layer(Dense, DenseConfig(), dims_for(7))
    _, k, v = layer.get_submodule("projections").split(numbers(2, 7, 16))  # type: ignore[operator]
    stored = sum(t.numel() * t.element_size() for t in (k, v))
    dims = Workload(causal=True, batch_size=2, seq_len=7, d_model=16, heads=2, element_bytes=8)
    assert layer.state_bytes(dims) == stored


def test_unknown_impl_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"impl='fast': .*sdpa"):
        DenseConfig(impl="fast")
