"""Image Transformer's memories equal those drawn token by token, in one and in two dimensions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import assert_same, assert_same_layer, drawn, feed, make_layer, numbers, oracle
from torch import Tensor

from bench.measure import gates
from variants.attention.dense import Dense, DenseConfig
from variants.attention.image_transformer import ImageTransformer, ImageTransformerConfig
from variants.base import Workload
from variants.ops.patterns.masks import Rule

SMALL: list[dict[str, Any]] = [
    {"block": 8, "memory": 5},
    {
        "dims": 2,
        "row": 8,
        "block_rows": 2,
        "block_columns": 3,
        "memory_rows": 3,
        "memory_columns": 2,
    },
    {"block": 5, "memory": 0},
    {
        "dims": 2,
        "row": 10,
        "block_rows": 1,
        "block_columns": 4,
        "memory_rows": 1,
        "memory_columns": 0,
        "impl": "plain",
    },
]

both_directions = pytest.mark.parametrize("causal", [True, False])


def dims_of(tokens: int, batch: int = 1) -> Workload:
    return Workload(causal=True, batch_size=batch, seq_len=tokens, d_model=12, heads=3)


def assert_reads(
    config: ImageTransformerConfig, allowed: Tensor, tokens: int, batch: int, *, causal: bool
) -> None:
    """Outputs, gradients, mask and cost are those of a mask (T, T)."""
    layer = make_layer(ImageTransformer, config, dims_of(tokens))
    assert isinstance(layer, ImageTransformer)
    allowed = allowed.tril() if causal else allowed
    x = numbers(batch, tokens, 12)
    assert_same(
        lambda: feed(layer, x, causal=causal),
        lambda: oracle(layer, x, allowed[None]),
        [x, *layer.parameters()],
    )
    assert torch.equal(layer.attention_mask(tokens, causal=causal), allowed)
    flops = layer.cost(replace(dims_of(tokens, batch), causal=causal))
    assert flops.mixing == batch * 3 * 4 * 4 * int(allowed.sum())


@both_directions
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(1, 60), block=st.integers(1, 20), memory=st.integers(0, 25), batch=st.integers(1, 2)
)
@example(tokens=64, block=8, memory=8, batch=2)
@example(tokens=9, block=12, memory=3, batch=1)
def test_one_dimension_equals_loops_over_the_blocks(
    causal: bool, tokens: int, block: int, memory: int, batch: int
) -> None:
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start in range(0, tokens, block):
        allowed[start : start + block, max(0, start - memory) : start + block + memory] = True
    config = ImageTransformerConfig(block=block, memory=memory)
    assert_reads(config, allowed, tokens, batch, causal=causal)


@both_directions
@settings(deadline=None, max_examples=15)
@given(
    tokens=st.integers(1, 60),
    row=st.integers(1, 12),
    height=st.integers(1, 4),
    columns=st.integers(1, 6),
    above=st.integers(0, 5),
    beside=st.integers(0, 4),
    batch=st.integers(1, 2),
)
@example(tokens=60, row=6, height=2, columns=3, above=1, beside=1, batch=2)
@example(tokens=59, row=7, height=3, columns=2, above=2, beside=9, batch=1)
@example(tokens=60, row=4, height=1, columns=2, above=4, beside=0, batch=1)
def test_two_dimensions_equal_a_grid_drawn_by_coordinates(
    causal: bool, tokens: int, row: int, height: int, columns: int, above: int, beside: int, batch: int
) -> None:
    def may_read(i: int, j: int) -> bool:
        (y, x), (key_y, key_x) = divmod(i, row), divmod(j, row)
        top, left = y - y % height, x - x % columns
        return (
            top - above <= key_y < top + height + above and left - beside <= key_x < left + columns + beside
        )

    config = ImageTransformerConfig(
        dims=2, row=row, block_rows=height, block_columns=columns, memory_rows=above, memory_columns=beside
    )
    assert_reads(config, drawn(tokens, may_read), tokens, batch, causal=causal)


@both_directions
@pytest.mark.parametrize(
    "knobs",
    [
        {"block": 50},
        {"block": 7, "memory": 40},
        {"dims": 2, "row": 8, "block_rows": 9, "block_columns": 8},
        {"dims": 2, "row": 8, "memory_rows": 5, "memory_columns": 8},
    ],
)
def test_a_memory_that_holds_the_sequence_is_dense(causal: bool, knobs: dict[str, int]) -> None:
    layer = make_layer(ImageTransformer, ImageTransformerConfig(**knobs), dims_of(40))
    dense = make_layer(Dense, DenseConfig(), dims_of(40), seed=1)
    assert_same_layer(layer, dense, numbers(2, 40, 12), causal=causal)


@both_directions
def test_a_block_without_memory_has_the_mask_of_chunks(causal: bool) -> None:
    config = ImageTransformerConfig(block=8, memory=0)
    layer = make_layer(ImageTransformer, config, dims_of(43))
    assert isinstance(layer, ImageTransformer)
    same = drawn(43, lambda i, j: i // 8 == j // 8)
    assert torch.equal(layer.attention_mask(43, causal=causal), same.tril() if causal else same)


@both_directions
def test_a_block_as_wide_as_the_grid_is_one_dimensional(causal: bool) -> None:
    """h rows of b tokens with a memory of m rows are h·b tokens with a memory of m·b tokens."""
    one = ImageTransformerConfig(block=24, memory=16)
    two = ImageTransformerConfig(dims=2, row=8, block_rows=3, block_columns=8, memory_rows=2)
    layers = [make_layer(ImageTransformer, config, dims_of(61)) for config in (one, two)]
    assert_same_layer(*layers, numbers(2, 61, 12), causal=causal)


@pytest.mark.parametrize("memory", [0, 5, 20])
def test_what_is_carried_is_what_a_later_token_reads(memory: int) -> None:
    """In closed form as from the mask."""
    layer = make_layer(ImageTransformer, ImageTransformerConfig(block=7, memory=memory), dims_of(40))
    assert isinstance(layer, ImageTransformer)
    later = layer.attention_mask(80, causal=True)
    for tokens in range(1, 41):
        assert layer.carried(tokens) == 3 * int(later[tokens:, :tokens].any(0).sum())


class UnmaskedMemory(ImageTransformer):
    """Reads its complete block, also what comes later."""

    def mask(self, seq_len: int, *, causal: bool) -> Rule:
        return self.rule(seq_len, causal=causal)


@pytest.mark.parametrize("dims", [1, 2])
def test_the_gate_sees_a_block_without_a_mask(dims: int) -> None:
    sizes = replace(dims_of(70, 2), d_model=24)
    config = ImageTransformerConfig(dims=dims, block=12, block_rows=2, block_columns=5, impl="dense")
    given = (sizes, gates.LEAK_LAYERS, torch.device("cpu"), torch.float32)
    assert gates.leak(ImageTransformer, config, *given) <= gates.LEAK_TOLERANCE
    with pytest.raises(gates.GateFailed, match="causality gate"):
        gates.leak(UnmaskedMemory, config, *given)
