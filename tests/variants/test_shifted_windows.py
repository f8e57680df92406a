"""Shifted windows equal attention within windows that are cut out by hand, and nothing wraps around."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_same, assert_same_layer, feed, make_layer, numbers, oracle
from torch import Tensor

from bench.measure import gates
from variants.attention.dense import Dense, DenseConfig
from variants.attention.shifted_windows import ShiftedWindows, ShiftedWindowsConfig
from variants.base import Workload
from variants.ops.patterns.masks import Rule, composed

SMALL: list[dict[str, Any]] = [{"window": 16}, {"window": 7}, {"window": 1}]

both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=3)


def windows(tokens: int, window: int, index: int, *, causal: bool) -> Tensor:
    """(T, T) bool: the sequence cut at every window, in odd layers half a window earlier."""
    cuts = [0, *range(window // 2 if index % 2 else window, tokens, window), tokens]
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, stop in pairwise(cuts):
        allowed[start:stop, start:stop] = True
    return allowed.tril() if causal else allowed


@both_directions
@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 70), window=st.integers(2, 40), batch=st.integers(1, 2), index=st.integers(0, 3))
@example(tokens=64, window=16, batch=2, index=1)
@example(tokens=5, window=12, batch=1, index=1)
def test_equals_windows_cut_by_hand(causal: bool, tokens: int, window: int, batch: int, index: int) -> None:
    layer = make_layer(ShiftedWindows, ShiftedWindowsConfig(window=window), dims_of(tokens), index=index)
    assert isinstance(layer, ShiftedWindows)
    x = numbers(batch, tokens, 12)
    allowed = windows(tokens, window, index, causal=causal)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: oracle(layer, x, allowed[None]),
        [x, *layer.parameters()],
    )
    assert torch.equal(layer.attention_mask(tokens, causal=causal), allowed)
    flops = layer.cost(replace(dims_of(tokens, batch), causal=causal))
    assert flops.mixing == batch * 3 * 4 * 4 * int(allowed.sum())


@both_directions
@pytest.mark.parametrize("index", [0, 1])
def test_a_window_that_holds_the_sequence_is_dense(causal: bool, index: int) -> None:
    layer = make_layer(ShiftedWindows, ShiftedWindowsConfig(window=80), dims_of(40), index=index)
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    assert_same_layer(layer, dense, numbers(2, 40, 12), causal=causal)


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_carried_is_what_a_later_token_reads(index: int) -> None:
    """In closed form as from the mask."""
    layer = make_layer(ShiftedWindows, ShiftedWindowsConfig(window=7), dims_of(40), index=index)
    assert isinstance(layer, ShiftedWindows)
    later = layer.attention_mask(80, causal=True)
    for tokens in range(1, 41):
        assert layer.carried(tokens) == 3 * int(later[tokens:, :tokens].any(0).sum())


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_each_layer_extends_the_reach_by_half_a_window(depth: int) -> None:
    """From the end of a window of the uppermost layer: w − 1 tokens, and w/2 more for each layer below."""
    tokens, window = 96, 8
    layers = [
        make_layer(ShiftedWindows, ShiftedWindowsConfig(window=window), dims_of(tokens), index=n)
        for n in range(depth)
    ]
    read = composed([layer.attention_mask(tokens, causal=True) for layer in layers])
    end = tokens - window // 2 - 1 if depth % 2 == 0 else tokens - 1  # the last of a full window
    assert end - int(read[end].nonzero()[0]) == window - 1 + (depth - 1) * window // 2


@dataclass(frozen=True)
class Cyclic(Rule):
    """Windows of the sequence after it is rolled by `shift`; the end and the start are in one window."""

    length: int
    shift: int
    tokens: int

    def __call__(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        i, j = (i - self.shift) % self.tokens, (j - self.shift) % self.tokens
        return (i // self.length == j // self.length) & (j <= i)


class WrapsAround(ShiftedWindows):
    """Rolls the sequence, and is causal within the windows of the rolled sequence."""

    def mask(self, seq_len: int, *, causal: bool) -> Rule:
        return Cyclic(self.config.window, self.shift, seq_len)


@pytest.mark.parametrize("tokens", [96, 91])
def test_the_gate_sees_windows_that_wrap_around(tokens: int) -> None:
    dims, config = replace(dims_of(tokens, 2), d_model=24), ShiftedWindowsConfig(window=16, impl="dense")
    given = (dims, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(ShiftedWindows, config, *given) <= gates.LEAK_TOLERANCE
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(WrapsAround, config, *given)
