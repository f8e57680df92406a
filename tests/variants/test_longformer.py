"""Longformer's window equals loops over each head's own keys, whatever its length, size and dilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_same, assert_same_layer, drawn, feed, make_layer, numbers, oracle
from torch import Tensor

from variants.base import Dims
from variants.dense import Dense, DenseConfig
from variants.longformer import Longformer, LongformerConfig

SMALL: list[dict[str, Any]] = [{"window": (8, 3), "dilation": (1, 3)}, {"window": (1,), "dilation": (2,)}]

HEADS = 3
both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Dims:
    return Dims(batch_size=batch, seq_len=tokens, d_model=12, heads=HEADS)


def windows(tokens: int, window: int, dilation: tuple[int, ...], *, causal: bool) -> Tensor:
    """(H, T, T) bool: each query's keys listed one by one, `dilation` apart, `window` − 1 on a side."""
    allowed = torch.zeros(HEADS, tokens, tokens, dtype=torch.bool)
    for head in range(HEADS):
        step = dilation[head % len(dilation)]
        for query in range(tokens):
            for neighbour in range(-(window - 1), 1 if causal else window):
                key = query + neighbour * step
                if 0 <= key < tokens:
                    allowed[head, query, key] = True
    return allowed


@both_directions
@pytest.mark.parametrize("longer", [0, 1, 500])
def test_window_of_the_whole_sequence_is_dense(causal: bool, longer: int) -> None:
    longformer = make_layer(Longformer, LongformerConfig(window=(40 + longer,)), dims_of(40))
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    assert_same_layer(longformer, dense, numbers(2, 40, 12), causal=causal)


@both_directions
@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 70),
    window=st.integers(1, 24),
    dilation=st.lists(st.integers(1, 6), min_size=1, max_size=HEADS).map(tuple),
    batch=st.integers(1, 3),
)
@example(tokens=1, window=1, dilation=(1,), batch=1)
@example(tokens=64, window=16, dilation=(1,), batch=2)
@example(tokens=65, window=16, dilation=(1, 2, 4), batch=2)
@example(tokens=4, window=2, dilation=(6, 1), batch=1)
def test_equals_loops_over_the_keys(
    causal: bool, tokens: int, window: int, dilation: tuple[int, ...], batch: int
) -> None:
    config = LongformerConfig(window=(window,), dilation=dilation)
    layer = make_layer(Longformer, config, dims_of(tokens))
    x = numbers(batch, tokens, 12)
    allowed = windows(tokens, window, dilation, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )
    assert torch.equal(layer.pattern(tokens, causal=causal), allowed.any(dim=0))
    flops = layer.flops(dims_of(tokens, batch), causal=causal)
    assert flops.attention == batch * 4 * 4 * int(allowed.sum())  # two products of D = 4 channels a pair
    assert flops.projections == batch * 8 * tokens * 12**2


@both_directions
@pytest.mark.parametrize(("index", "window"), [(0, 3), (1, 7), (2, 15), (3, 15), (9, 15)])
def test_each_layer_has_its_own_window(causal: bool, index: int, window: int) -> None:
    """The entries go from the bottom up; layers above the last repeat it."""
    layer = make_layer(Longformer, LongformerConfig(window=(3, 7, 15)), dims_of(50), index=index)
    x = numbers(1, 50, 12)
    allowed = drawn(50, lambda i, j: abs(i - j) < window and (j <= i or not causal))
    assert_same(
        lambda: feed(layer, x, causal=causal), lambda: oracle(layer, x, allowed), [x, *layer.parameters()]
    )


@both_directions
def test_heads_read_apart(causal: bool) -> None:
    """Each head follows its own dilation: with values in one head alone, its keys show."""
    layer = make_layer(Longformer, LongformerConfig(window=(3,), dilation=(1, 4, 9)), dims_of(40))
    qkv = layer.get_parameter("projections.qkv.weight")
    for head, step in enumerate((1, 4, 9)):
        with torch.no_grad():
            values = qkv[24:].clone()
            qkv[24:] = 0
            qkv[24 + 4 * head : 24 + 4 * (head + 1)] = values[4 * head : 4 * (head + 1)]
        x = numbers(1, 40, 12)
        (gradient,) = torch.autograd.grad(feed(layer, x, causal=causal)[0, 20].sum(), x)
        read = {int(j) for j in gradient[0].abs().amax(-1).nonzero()[:, 0]}
        sides = range(-2, 1) if causal else range(-2, 3)
        assert read == {20 + n * step for n in sides}
        with torch.no_grad():
            qkv[24:] = values


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 60),
    window=st.integers(2, 20),
    dilation=st.lists(st.integers(1, 5), min_size=1, max_size=HEADS).map(tuple),
)
def test_state_is_what_a_later_query_reads(tokens: int, window: int, dilation: tuple[int, ...]) -> None:
    """The tokens that any later query of a head reaches; the query's own may be counted too."""
    layer = make_layer(Longformer, LongformerConfig(window=(window,), dilation=dilation), dims_of(tokens))
    later = windows(tokens + window * max(dilation), window, dilation, causal=True)[:, tokens:, :tokens]
    needed = int(later.any(dim=1).sum())  # (head, key) pairs
    stored = layer.state_bytes(dims_of(tokens, batch=2)) / (2 * 2 * 4 * 4)  # K and V, batch, D, bytes
    assert needed <= stored <= needed + HEADS


@pytest.mark.parametrize("knob", ["window", "dilation"])
@pytest.mark.parametrize("value", [(), (0,), (4, -1)])
def test_impossible_knob_is_refused_by_name(knob: str, value: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{knob}="):
        LongformerConfig(**{knob: value})
